from __future__ import annotations

import asyncio

import pytest
from helpers_connectors import collect, frame, frames, settled

from streamattn.connectors.memory import MemorySink, MemorySource
from streamattn.errors import ConnectorError, SendError


async def test_what_was_acknowledged_is_recorded_once() -> None:
    async with MemorySource(frames(3)) as source:
        source.end()
        deliveries = [delivery async for batch in source.frames() for delivery in batch]
        assert source.num_acknowledged == 0
        deliveries[1].acknowledge()
        assert list(source.acknowledged) == [deliveries[1].message]
        with pytest.raises(ConnectorError, match="found two"):
            deliveries[1].acknowledge()
        assert source.num_acknowledged == 1


async def test_put_waits_for_room() -> None:
    source = MemorySource(capacity=5)
    putting = asyncio.gather(*(source.put(item) for item in frames(20)))
    assert await settled(lambda: len(source._waiting)) == 5
    assert len(await collect(source, 20)) == 20
    await putting
    await source.close()
    with pytest.raises(SendError):
        await source.put(frame("s", 0))


async def test_closing_ends_a_waiting_put() -> None:
    source = MemorySource([frame("s", 0)], capacity=1)
    putting = asyncio.create_task(source.put(frame("s", 1)))
    await asyncio.sleep(0)
    await source.close()
    with pytest.raises(SendError):
        await putting


async def test_a_sink_keeps_results_until_they_are_taken() -> None:
    async with MemorySink(capacity=3) as sink:
        items = frames(10)

        async def send() -> None:
            for item in items:
                await sink.send(item)
            await sink.close()

        sending = asyncio.create_task(send())
        assert await settled(lambda: sink.stats.messages) == 3
        assert await sink.get() is items[0]
        assert [item async for item in sink] == items[1:]
        await sending
    assert sink.take() == []
    with pytest.raises(ConnectorError, match="closed and empty"):
        await sink.get()
    with pytest.raises(SendError):
        await sink.send(items[0])


async def test_a_closed_name_is_made_anew() -> None:
    first = MemorySink.named("x")
    assert MemorySink.named("x") is first
    await first.close()
    assert MemorySink.named("x") is not first
