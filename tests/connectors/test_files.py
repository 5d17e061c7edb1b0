from __future__ import annotations

import asyncio
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from helpers_connectors import collect, frame, frames, sequences

from streamattn.connectors.files import FileSink, FileSource
from streamattn.errors import ConfigError, ConnectError, ConnectorError, SendError
from streamattn.frame import Frame, Message, Result, encode

INF = float("inf")
RECORD = 12  # bytes before a payload


async def record(path: Path, items: list[Message]) -> None:
    async with FileSink(path) as sink:
        for item in items:
            await sink.send(item)


async def replay(path: Path, speed: float = INF) -> tuple[FileSource, list[Message]]:
    async with FileSource(path, speed=speed) as source:
        return source, [delivery.message async for batch in source.frames() for delivery in batch]


def at(ns: int, sequence: int) -> Frame:
    return Frame("s", 1, sequence, 0, ids=frame("s", 0).ids, arrival_ns=ns)


async def test_replays_what_was_recorded_in_several_runs(tmp_path: Path) -> None:
    path = tmp_path / "r"
    result = Result("s", 1, 0, 1, 0, 1, 2, 3, heads={"up": np.zeros((1, 3), np.float32)})
    await record(path, [*frames(10), result])
    await record(path, [frame("s0", 10)])
    source, found = await replay(path)
    assert [encode(m) for m in found] == [encode(m) for m in [*frames(10), result, frame("s0", 10)]]
    assert source.stats.messages == 12
    assert source.stats.num_bytes == sum(len(encode(m)) for m in found)


async def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    await record(tmp_path / "r", [at(123_456_789, 0)])
    data = encode(at(0, 0))
    expected = b"streamattn recording 1\n" + struct.pack("<Iq", len(data), 123_456_789) + data
    assert (tmp_path / "r").read_bytes() == expected


async def test_keeps_the_recorded_pace(tmp_path: Path) -> None:
    """Lower bounds only: a busy machine can be late but not early."""
    base = 10**15
    await record(tmp_path / "r", [at(base + i * 40_000_000, i) for i in range(6)])
    for speed, least in [(1.0, 0.2), (4.0, 0.05)]:
        start = time.monotonic_ns()
        _, found = await replay(tmp_path / "r", speed)
        assert time.monotonic_ns() - start >= least * 1e9
        stamps = [m.arrival_ns for m in found if isinstance(m, Frame)]
        assert stamps[0] >= start
        for i, stamp in enumerate(stamps):
            assert stamp - start >= i * 40_000_000 / speed


async def test_a_clock_that_started_anew_does_not_stop_a_replay(tmp_path: Path) -> None:
    hour = 3_600 * 10**9
    await record(tmp_path / "r", [at(9 * hour, 0), at(hour, 1), at(hour + 50_000_000, 2)])
    async with asyncio.timeout(5):
        _, found = await replay(tmp_path / "r", 1.0)
    _, second, third = (m.arrival_ns for m in found if isinstance(m, Frame))
    assert third - second >= 50_000_000  # and the pace is kept after it


@pytest.mark.parametrize("cut", [1, 5, RECORD + 1])
async def test_a_torn_record_loses_none_before_it(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r"
    await record(path, list(frames(600)))
    whole = path.stat().st_size
    await record(path, [frame("s0", 600)])
    os.truncate(path, whole + cut)
    source, found = await replay(path)
    assert len(found) == 600
    assert source.stats.bad_messages == 1
    await record(path, [frame("s0", 600)])  # the torn bytes are cut off first
    source, found = await replay(path)
    assert len(found) == 601
    assert source.stats.bad_messages == 0


async def test_damage_is_reported_with_its_offset_after_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "r"
    await record(path, list(frames(3)))
    end = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"\xff" * 100)
    found = []
    async with FileSource(path, speed=INF) as source:
        with pytest.raises(ConnectorError, match=f"damaged at byte {end}"):
            await collect(source, 4, found)
    assert sequences(found) == {"s0": [0, 1, 2]}
    with pytest.raises(ConnectError, match=f"damaged at byte {end}"):
        await record(path, [])


async def test_other_files_are_refused(tmp_path: Path) -> None:
    for content, what in [
        (b"time,price\n1,2\n", "time,price"),
        (b"streamattn recording 9\n", "version 1"),
        (b"", "found b''"),
    ]:
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ConnectError, match=what):
            await FileSource(tmp_path / "x").__aenter__()
        if content:
            with pytest.raises(ConnectError, match=what):
                await FileSink(tmp_path / "x").__aenter__()
            assert (tmp_path / "x").read_bytes() == content
    with pytest.raises(ConnectError, match="No such file"):
        await FileSource(tmp_path / "none").__aenter__()
    with pytest.raises(ConnectError, match="No such file"):
        await FileSink(tmp_path / "none" / "x").__aenter__()
    with pytest.raises(ConfigError, match="speed"):
        FileSource(tmp_path / "x", speed=-1)


async def test_one_recorder_at_a_time(tmp_path: Path) -> None:
    async with FileSink(tmp_path / "r") as sink:
        with pytest.raises(ConnectError, match="another process"):
            await FileSink(tmp_path / "r").__aenter__()
        await sink.send(frame("s", 0))
    with pytest.raises(SendError, match="closed"):
        await sink.send(frame("s", 1))
    assert len((await replay(tmp_path / "r"))[1]) == 1


async def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    await record(tmp_path / "r", list(frames(3_000, num_events=500)))
    async with FileSource(tmp_path / "r", speed=INF) as source:
        async for batch in source.frames():
            assert len(batch) <= 512
    assert source.stats.messages == 3_000
