"""What every connector keeps: order, backpressure, clean ends, and harmless bad bytes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_connectors import (
    NETWORKED,
    RIGS,
    WAITING,
    WITH_PEER,
    Rig,
    collect,
    eventually,
    footprint,
    frame,
    frames,
    sequences,
    settled,
)

from streamattn.errors import ConnectorError
from streamattn.frame import Delivery, Frame


@pytest.fixture(params=list(RIGS))
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    with closing_rig(RIGS[request.param](tmp_path)) as rig:
        yield rig


@contextlib.contextmanager
def closing_rig(rig: Rig) -> Iterator[Rig]:
    try:
        yield rig
    finally:
        rig.stop()


async def test_keeps_the_order_of_every_stream(rig: Rig) -> None:
    async with rig.fed(frames(10_000, streams=5)) as source:
        found = await collect(source, 10_000)
        assert sequences(found) == {f"s{i}": list(range(2_000)) for i in range(5)}
        assert source.stats.messages >= 10_000
        assert source.stats.num_bytes > 0 or (isinstance(source.name, str) and source.name == "memory")


async def test_stamps_the_time_of_arrival(rig: Rig) -> None:
    async with rig.fed(frames(50)) as source:
        stamps = [d.message.arrival_ns for d in await collect(source, 50) if isinstance(d.message, Frame)]
    assert stamps[0] > 0
    assert stamps == sorted(stamps)


@pytest.mark.parametrize("rig", WAITING, indirect=True)
async def test_a_slow_consumer_makes_the_producer_wait_and_loses_nothing(rig: Rig) -> None:
    # 64 MB in all: more than queues and kernel buffers hold
    count, num_events = 4_000 if rig.holds_producer else 1_000, 4_000
    async with rig.fed(frames(count, streams=2, num_events=num_events)) as source:
        found = await collect(source, 1)
        assert len(found) <= 512
        if rig.holds_producer:
            assert await settled(lambda: rig.sent) < count, "the producer was not held up"
        await collect(source, count, found)
    expected = list(range(0, count // 2 * num_events, num_events))
    assert sequences(found) == {"s0": expected, "s1": expected}
    assert source.stats.dropped == 0


async def test_close_ends_a_waiting_iteration(rig: Rig) -> None:
    async with rig.fed([]) as source:
        iterating = asyncio.create_task(collect(source, 1))
        await asyncio.sleep(0.01)
        await source.close()
        assert await iterating == []
        await source.close()  # a second time is harmless
        assert [batch async for batch in source.frames()] == []


async def test_a_cancelled_iteration_loses_nothing(rig: Rig) -> None:
    found: list[Delivery] = []
    cancelled = 0
    async with rig.fed(frames(3_000, streams=3)) as source:
        while len(found) < 3_000:
            iterating = asyncio.create_task(collect(source, 3_000, found))
            for _ in range(cancelled % 7):
                await asyncio.sleep(0)
            iterating.cancel()
            cancelled += isinstance(
                (await asyncio.gather(iterating, return_exceptions=True))[0], asyncio.CancelledError
            )
    assert cancelled > 0
    assert sequences(found) == {f"s{i}": list(range(1_000)) for i in range(3)}


async def test_bad_bytes_are_counted_and_harm_nothing(rig: Rig) -> None:
    bad = [b"\x00", b"not a message", b"\x91" * 5_000, b"\xc1" * 100]
    items = [item for i in range(100) for item in (frame("s0", i), bad[i % len(bad)])]
    async with rig.fed(items) as source:
        found = await collect(source, 100)
        assert sequences(found) == {"s0": list(range(100))}
        await collect_until_bad(source, 100)
        assert source.stats.bad_messages == 100


async def collect_until_bad(source, count: int) -> None:
    """The last bad bytes lie behind the last frame."""
    iterating = asyncio.create_task(collect(source, 1))
    await eventually(lambda: source.stats.bad_messages >= count, "counting the bad messages")
    iterating.cancel()
    await asyncio.gather(iterating, return_exceptions=True)


@pytest.mark.parametrize("rig", WITH_PEER, indirect=True)
async def test_goes_on_when_the_peer_comes_back(rig: Rig) -> None:
    async with rig.source() as source:
        for life in range(3):
            async with rig.peer(source) as peer:
                await rig.joined(source, peer)
                await rig.feed(peer, [frame(f"life{life}", i) for i in range(20)])
                assert sequences(await collect(source, 20)) == {f"life{life}": list(range(20))}
        await eventually(lambda: source.stats.reconnects >= 2, "counting the broken connections")


async def test_acknowledges_each_message_once(rig: Rig) -> None:
    async with rig.fed(frames(200)) as source:
        deliveries: list[Delivery] = []
        async for batch in source.frames():
            deliveries += [d for d in batch if isinstance(d.message, Frame)]
            if len(deliveries) == 200:
                break
        for delivery in reversed(deliveries):  # any order will do
            delivery.acknowledge()
        assert getattr(source, "num_acknowledged", 200) == 200


async def test_leaves_no_task_thread_or_descriptor(rig: Rig) -> None:
    async with rig.fed(frames(10)) as source:  # what is made once and kept is made here
        await collect(source, 10)
    before = footprint()
    for i in range(3):
        async with rig.fed(frames(500)) as source:
            await collect(source, 1 if i else 500)
    await eventually(lambda: footprint() == before, f"the footprint {before} (now {footprint()})")


async def test_leaves_nothing_when_the_body_fails(rig: Rig) -> None:
    async def fail() -> None:
        nonlocal source
        async with rig.fed(frames(10)) as source:
            await collect(source, 1)
            raise ZeroDivisionError

    source: Any = None
    with pytest.raises(ZeroDivisionError):
        await fail()
    assert [batch async for batch in source.frames()] == []


@pytest.mark.parametrize("rig", [*NETWORKED, "file"], indirect=True)
async def test_says_that_it_was_not_opened(rig: Rig) -> None:
    source = rig.source()
    with pytest.raises(ConnectorError, match="async with"):
        await anext(aiter(source.frames()))
