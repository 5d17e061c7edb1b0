"""Runtime: answers through real transports, acknowledgements, start and stop, faults of every part, hostile input."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
from helpers_connectors import footprint, free_port
from helpers_engine import FEATURES, VOCAB, eventually, expected_logits, make_frame, random_events, small_model

from streamattn.connectors.memory import MemorySink, MemorySource
from streamattn.connectors.zeromq import ZmqSink, ZmqSource
from streamattn.engine import Engine
from streamattn.errors import ConfigError, ConnectError, ConnectorError, EngineError, SendError
from streamattn.frame import GAP, Control, Delivery, Fault, Frame, Heartbeat, Message, Reply, Result, encode
from streamattn.model import Head, ModelConfig, StreamTransformer
from streamattn.pattern import Pattern, Window
from streamattn.runtime import Runtime, RuntimeStats
from streamattn.scheduler import Policy

TOLERANCE = 2e-5
MODEL = small_model()
DATA = {f"s{i}": random_events(40, seed=i) for i in range(4)}
WANTED = {name: expected_logits(MODEL, *events) for name, events in DATA.items()}


def new_engine(lanes: int = 4, marks: int = 0, **policy: Any) -> Engine:
    return Engine(MODEL, lanes=lanes, marks=marks, policy=Policy(**policy), auto_open=True)


def one_event_frames(streams: Sequence[str] = tuple(DATA), count: int = 40) -> list[Message]:
    """Return the first `count` events of each stream, a frame each, the streams taking turns."""
    return [make_frame(s, i, DATA[s][0][i : i + 1], DATA[s][1][i : i + 1]) for i in range(count) for s in streams]


def check_answers(messages: Sequence[Message], stream: str, count: int = 40) -> None:
    results = [m for m in messages if isinstance(m, Result) and m.stream == stream]
    sequences = [r.sequence + i for r in results for i in range(r.num_events)]
    assert sequences == list(range(count))
    found = np.concatenate([r.heads["next"] for r in results])
    np.testing.assert_allclose(found, WANTED[stream][:count], rtol=0, atol=TOLERANCE)


def check_books(stats: RuntimeStats) -> None:
    assert stats.frames == stats.answered + stats.dropped.total()


def faults(messages: Sequence[Message]) -> list[tuple[str, int, str]]:
    return [(m.stream, m.request, m.code) for m in messages if isinstance(m, Fault)]


async def run_over(engine: Engine, *messages: Message | bytes, **options: Any) -> tuple[list[Message], Runtime]:
    """Run until these messages are answered; every one that decodes must be acknowledged, once."""
    source, sink = MemorySource(messages), MemorySink()
    source.end()
    runtime = Runtime(engine, [source], [sink], **options)
    stats = await runtime.run()
    assert source.num_acknowledged == source.stats.messages
    check_books(stats)
    return sink.take(), runtime


@dataclass(eq=False)
class Faulty:
    """A real connector whose n-th call of one method fails."""

    inner: Any
    method: str
    at: int
    error: Exception = field(default_factory=lambda: ConnectorError("cable cut"))
    calls: int = 0
    closed: int = 0

    def __post_init__(self) -> None:
        self.name, self.stats = f"faulty {self.inner.name}", self.inner.stats

    def _call(self, method: str) -> None:
        if method == self.method:
            self.calls += 1
            if self.calls == self.at:
                raise self.error

    async def __aenter__(self) -> Faulty:
        self._call("enter")
        await self.inner.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        self.closed += 1
        await self.inner.__aexit__(*exc)
        self._call("exit")

    async def frames(self) -> AsyncIterator[Sequence[Delivery]]:
        async for batch in self.inner.frames():
            for delivery in batch:
                self._call("frames")
                yield [delivery]

    async def send(self, message: Message) -> None:
        self._call("send")
        await self.inner.send(message)

    async def close(self) -> None:
        self._call("close")
        await self.inner.close()


class StuckSink(MemorySink):
    """Takes `free` messages and then none until it is released."""

    def __init__(self, free: int = 0) -> None:
        super().__init__()
        self.free, self.released = free, asyncio.Event()

    async def send(self, message: Message) -> None:
        if self.free <= 0:
            await self.released.wait()
        self.free -= 1
        await super().send(message)


@pytest.fixture(autouse=True)
async def _nothing_is_left() -> AsyncIterator[None]:
    before = footprint()
    yield
    await eventually(lambda: footprint() <= before)


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [1, 3, 4096])
async def test_each_stream_is_answered_in_order_and_every_message_is_acknowledged_once(in_flight: int) -> None:
    messages, runtime = await run_over(new_engine(), *one_event_frames(), in_flight=in_flight)
    for stream in DATA:
        check_answers(messages, stream)
    stats = runtime.stats
    assert (stats.frames, stats.answered, stats.results, stats.events) == (160, 160, 160, 160)
    assert stats.latency.count == 160
    assert (stats.failed, stats.faults, stats.ignored) == ([], 0, 0)
    with pytest.raises(ConfigError, match="expected to be run once"):
        await runtime.run()


async def test_several_sources_and_sinks() -> None:
    sources = [MemorySource(one_event_frames([stream])) for stream in DATA]
    sinks = [MemorySink(), MemorySink()]
    for source in sources:
        source.end()
    seen: list[int] = []
    runtime = Runtime(new_engine(), sources, sinks, on_progress=lambda stats: seen.append(stats.answered))
    await runtime.run()
    for sink in sinks:
        messages = sink.take()
        assert len(messages) == 160
        for stream in DATA:
            check_answers(messages, stream)
    assert [source.num_acknowledged for source in sources] == [40] * 4
    assert seen == list(range(1, 161))


@pytest.mark.parametrize("patterns", [("push", "pull"), ("pub", "sub")])
async def test_over_real_sockets(patterns: tuple[str, str]) -> None:
    send_kind, receive_kind = cast(Any, patterns[0]), cast(Any, patterns[1])
    way_in, way_out = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    source = ZmqSource(receive_kind, [way_in], bind=receive_kind == "pull")
    sink = ZmqSink(send_kind, [way_out], bind=True, heartbeat=0.05)
    runtime = Runtime(new_engine(), [source], [sink])
    running = asyncio.create_task(runtime.run())
    producer = ZmqSink(send_kind, [way_in], bind=send_kind == "pub", heartbeat=0.05)
    found: list[Message] = []

    async def collect(answers: ZmqSource) -> None:
        async for batch in answers.frames():
            found.extend(delivery.message for delivery in batch)

    async with producer, ZmqSource(receive_kind, [way_out]) as answers:
        collecting = asyncio.create_task(collect(answers))
        opened = [Control(stream, 0, "open", i + 1) for i, stream in enumerate(DATA)]
        while len({m.request for m in found if isinstance(m, Reply)}) < len(DATA):  # both ways are open then
            for control in opened:
                await producer.send(control)
            await asyncio.sleep(0.01)
        for message in one_event_frames():
            await producer.send(message)
        await eventually(lambda: sum(isinstance(m, Result) for m in found) == 160)
        beats = lambda: [m for m in found if isinstance(m, Heartbeat)]  # noqa: E731
        await eventually(lambda: {m.stream for m in beats()} == set(DATA))  # the end of the answers is announced
        assert {m.next_sequence for m in beats()} == {40}
        runtime.stop()
        stats = await running
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
    for stream in DATA:
        check_answers(found, stream)
    check_books(stats)
    assert stats.answered == 160
    assert stats.faults == 0  # the producer's heartbeats are no errors


async def test_heartbeats_reveal_what_was_lost_at_the_tail() -> None:
    engine = new_engine()
    tail = [Heartbeat("s0", 0, 9, 0), Heartbeat("nobody", 0, 4, 0), *one_event_frames(["s0"])[9:10]]
    messages, runtime = await run_over(engine, *one_event_frames(["s0"], 5), *tail)
    assert engine.scheduler.counters.missing_events == 4
    last = messages[-1]
    assert isinstance(last, Result)
    assert (last.sequence, last.missing, last.flags & GAP) == (9, 4, GAP)
    assert (len(messages), runtime.stats.faults) == (6, 0)


async def test_controls_are_answered_in_order_with_data() -> None:
    frames = one_event_frames(["s0"])
    messages, _ = await run_over(
        new_engine(marks=1),
        Control("s0", 0, "open", 1),
        *frames[:3],
        Control("s0", 0, "mark", 2),
        *frames[3:5],
        Control("s0", 0, "rollback", 3, 0),
        Control("s0", 0, "rollback", 4, 7),
        Control("s0", 0, "reset", 5),
        Control("s0", 0, "close", 6),
        Control("s0", 0, "mark", 7),
        Control("s0", 0, "open", 8),
    )
    replies = {m.request: m.value for m in messages if isinstance(m, Reply)}
    assert (replies[2], replies[3], replies[5], replies[6]) == (0, 3, 0, 0)
    assert 1 in replies
    assert 8 in replies
    assert ("s0", 4, "bad_input") in faults(messages)
    assert ("s0", 7, "unknown_stream") in faults(messages)
    order = [100 + m.sequence if isinstance(m, Result) else cast(Any, m).request for m in messages]
    assert [x for x in order if x not in (1, 7, 8)] == [100, 101, 102, 2, 103, 104, 3, 4, 5, 6]


async def test_a_result_too_large_for_the_wire_leaves_in_parts() -> None:
    heads = (Head("next", "logits", 40),)
    config = ModelConfig((Pattern(Window(4)),), 8, 1, 1, 8, 8, heads, vocab=40)
    engine = Engine(StreamTransformer(config), lanes=1, auto_open=True, policy=Policy(max_chunk=4096, step_tokens=4096))
    ids = np.arange(10_000, dtype=np.int32) % 40
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    source, memory = MemorySource([Frame("a", 0, 5, 77, ids), Frame("a", 0, 10_005, 78, ids[:1])]), MemorySink()
    sink = ZmqSink("push", [endpoint], bind=True)
    found: list[Message] = []
    async with ZmqSource("pull", [endpoint]) as answers:
        source.end()
        running = asyncio.create_task(Runtime(engine, [source], [memory, sink]).run())
        async for batch in answers.frames():
            found += [d.message for d in batch if isinstance(d.message, Result)]
            if len(found) == 3:
                break
        stats = await running
    (whole, _) = memory.take()
    assert isinstance(whole, Result)
    parts = [m for m in found if isinstance(m, Result)]
    assert [(r.sequence, r.num_events, r.event_ns) for r in parts] == [(5, 5000, 77), (5005, 5000, 77), (10_005, 1, 78)]
    np.testing.assert_array_equal(np.concatenate([r.heads["next"] for r in parts[:2]]), whole.heads["next"])
    assert (stats.failed, stats.answered, stats.results) == ([], 2, 2)


async def test_a_result_without_a_wire_form_is_a_fault_of_its_frame_only() -> None:
    heads = tuple(Head(f"h{i}", "classes", 2) for i in range(33))  # one more than the wire carries
    config = ModelConfig((Pattern(Window(4)),), 8, 1, 1, 8, 8, heads, vocab=40)
    engine = Engine(StreamTransformer(config), lanes=1, auto_open=True)
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    source = MemorySource([Frame("a", 0, i, 0, np.zeros(1, np.int32)) for i in range(2)])
    source.end()
    async with ZmqSource("pull", [endpoint]) as answers:
        running = asyncio.create_task(Runtime(engine, [source], [ZmqSink("push", [endpoint], bind=True)]).run())
        found: list[Message] = []
        async for batch in answers.frames():
            found += [delivery.message for delivery in batch]
            if len(faults(found)) == 2:
                break
        assert (await running).failed == []
    assert faults(found) == [("a", 0, "internal")] * 2


# --- input that is wrong, hostile or too much ------------------------------------------------------------------------


async def test_hostile_input_harms_nobody() -> None:
    ids, features = DATA["s0"]
    bad: list[Message | bytes] = [
        b"\xc1" * 100,
        b"",
        encode(make_frame("s0", 0, ids[:1], features[:1]))[:-3],
        Result("s0", 0, 0, 1, 0, 0, 0, 0, {"next": np.zeros((1, VOCAB), np.float32)}),
        Fault("s0", 0, "internal", "not ours"),
        Reply("s0", 0, 0, 0),
        Frame("wide", 0, 0, 0, ids[:1], np.zeros((1, FEATURES + 1), np.float32)),
        Frame("bare", 0, 0, 0, ids[:1]),
        Frame("s0", 0, 0, 0, np.array([VOCAB], np.int32), features[:1]),
        Frame("s0", 0, 0, 0, np.array([-1], np.int32), features[:1]),
        Frame("s0", 0, 0, 0, ids[:1], np.full((1, FEATURES), np.nan, np.float32)),
        Control("nobody", 0, "reset", 9),
        Control("nobody", 0, "rollback", 10, 3),
        Heartbeat("nobody", 0, 5, 0),
    ]
    good = one_event_frames(["s0", "s1"])
    mixed = [message for i, frame in enumerate(good) for message in (frame, bad[i % len(bad)])]
    messages, runtime = await run_over(new_engine(), *mixed)
    for stream in ("s0", "s1"):
        check_answers(messages, stream)
    kinds = Counter(bad.index(m) for m in mixed if not isinstance(m, Frame) or m in bad)
    counts = Counter(faults(messages))
    assert counts[("wide", 0, "bad_input")] == kinds[6]
    assert counts[("bare", 0, "bad_input")] == kinds[7]
    assert counts[("s0", 0, "bad_input")] == kinds[8] + kinds[9] + kinds[10]
    assert counts[("nobody", 9, "unknown_stream")] == kinds[11]
    assert counts[("nobody", 10, "unknown_stream")] == kinds[12]
    assert len(counts) == 5
    assert runtime.stats.faults == sum(counts.values())
    assert runtime.stats.dropped == {"bad_input": sum(kinds[i] for i in range(6, 11))}
    assert runtime.stats.ignored == kinds[3] + kinds[4] + kinds[5]
    assert runtime.sources[0].stats.bad_messages == kinds[0] + kinds[1] + kinds[2]
    assert set(runtime.engine.streams) == {"s0", "s1"}  # what was refused has taken no lane


async def test_no_lane_is_a_fault_and_the_frame_is_acknowledged() -> None:
    messages, runtime = await run_over(new_engine(lanes=2), *one_event_frames(["s0", "s1", "s2"], 3))
    check_answers(messages, "s0", 3)
    check_answers(messages, "s1", 3)
    assert faults(messages) == [("s2", 0, "overloaded")] * 3
    assert runtime.stats.dropped == {"overloaded": 3}


async def test_a_full_queue_is_a_fault_under_reject_and_silent_under_drop_oldest() -> None:
    ids, features = random_events(4)
    frames = [make_frame("a", 4 * i, ids, features) for i in range(20)]
    rejecting = new_engine(overflow="reject", queue_events=8, chunk=1, max_chunk=1)
    messages, runtime = await run_over(rejecting, *frames)
    assert set(faults(messages)) == {("a", 0, "overloaded")}
    assert runtime.stats.dropped["overloaded"] == len(faults(messages)) == rejecting.scheduler.counters.rejected
    dropping = new_engine(overflow="drop_oldest", queue_events=8, chunk=1, max_chunk=1)
    messages, runtime = await run_over(dropping, *frames)
    assert faults(messages) == []
    assert runtime.stats.dropped["drop_oldest"] == dropping.scheduler.counters.dropped["drop_oldest"].frames > 0


async def test_an_old_producer_is_told_and_duplicates_are_dropped() -> None:
    ids, features = DATA["s0"]
    new, again, old = (Frame("s0", epoch, 0, 0, ids[:1], features[:1]) for epoch in (2, 2, 1))
    messages, runtime = await run_over(new_engine(), new, again, old)
    assert faults(messages) == [("s0", 0, "stale_epoch")]
    assert runtime.stats.dropped == {"duplicate": 1, "stale_epoch": 1}
    assert runtime.stats.results == 1


async def test_commands_of_a_stream_that_ends_before_their_turn_are_answered() -> None:
    frames = one_event_frames(["s0"], 2)
    controls = [Control("s0", 0, "close", 1), Control("s0", 0, "mark", 2), Control("s0", 0, "reset", 3)]
    messages, runtime = await run_over(new_engine(), *frames[:1], *controls, frames[1])
    assert [m.request for m in messages if isinstance(m, Reply)] == [1]
    assert faults(messages) == [("s0", 2, "unknown_stream"), ("s0", 3, "unknown_stream")]
    assert runtime.stats.answered + runtime.stats.dropped["closed"] == 2


async def test_a_stream_that_fails_is_reported_and_the_others_go_on() -> None:
    huge = Frame("bad", 0, 0, 0, np.zeros(1, np.int32), np.full((1, FEATURES), 3e38, np.float32))
    messages, runtime = await run_over(new_engine(), huge, *one_event_frames(["s0"]))
    check_answers(messages, "s0")
    assert faults(messages) == [("bad", 0, "internal")]
    assert runtime.stats.dropped == {"failed": 1}


# --- backpressure ----------------------------------------------------------------------------------------------------


async def test_a_slow_sink_holds_the_source_back() -> None:
    source, sink = MemorySource(capacity=100), StuckSink(free=10)
    runtime = Runtime(new_engine(), [source], [sink], in_flight=8)
    running = asyncio.create_task(runtime.run())

    async def produce() -> None:
        for i in range(2000):
            await source.put(Frame("s0", 0, i, 0, *_event()))
        source.end()

    producing = asyncio.create_task(produce())
    await eventually(lambda: sink.stats.messages == 10 and runtime.stats.frames == 18)
    await eventually(lambda: not producing.done() and len(source._waiting) == 100)
    assert runtime.stats.frames == 18  # ten were taken by the sink, eight are under way, no more were read
    assert source.num_acknowledged == 10
    assert source.stats.messages < 10 + 8 + 512 + 1  # one wake-up's worth has left the transport
    sink.free = 10_000
    sink.released.set()
    assert (await running).answered == 2000
    await producing
    assert [m.sequence for m in sink.take() if isinstance(m, Result)] == list(range(2000))


def _event() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(1, np.int32), np.zeros((1, FEATURES), np.float32)


async def test_a_stop_waits_for_a_sink_a_bounded_time_and_acknowledges_nothing_it_did_not_take() -> None:
    source, sink = MemorySource(one_event_frames(["s0"])), StuckSink(free=5)
    runtime = Runtime(new_engine(), [source], [sink], in_flight=16, drain_seconds=0.05)
    running = asyncio.create_task(runtime.run())
    await eventually(lambda: runtime.stats.frames == 21)
    runtime.stop()
    stats = await running
    assert source.num_acknowledged == 5 == len(sink.take())
    assert stats.dropped == {"undelivered": 16}
    check_books(stats)


# --- start and stop --------------------------------------------------------------------------------------------------


async def test_stop_while_a_source_waits() -> None:
    runtime = Runtime(new_engine(), [source := MemorySource()], [sink := MemorySink()])
    running = asyncio.create_task(runtime.run())
    await source.put(one_event_frames(["s0"], 1)[0])
    check_answers([await sink.get()], "s0", 1)
    runtime.stop()
    assert (await running).answered == 1
    with pytest.raises(SendError):
        await sink.send(Heartbeat("s0", 0, 0, 0))  # it was closed


async def test_stop_before_the_run() -> None:
    runtime = Runtime(new_engine(), [MemorySource()], [MemorySink()])
    runtime.stop()
    assert (await runtime.run()).frames == 0


async def test_stop_under_load_answers_all_that_was_accepted() -> None:
    source, sink = MemorySource(capacity=64), MemorySink()
    runtime = Runtime(new_engine(), [source], [sink], in_flight=32)
    running = asyncio.create_task(runtime.run())

    async def produce() -> None:
        for i in range(1_000_000):
            await source.put(Frame("s0", 0, i, 0, *_event()))

    producing = asyncio.create_task(produce())
    await eventually(lambda: sink.stats.messages > 100)
    runtime.stop()
    stats = await running
    with pytest.raises(SendError):
        await producing
    results = [m.sequence for m in sink.take() if isinstance(m, Result)]
    assert results == list(range(stats.frames))
    assert stats.answered == stats.frames == source.num_acknowledged == source.stats.messages


async def test_cancelling_a_run_leaves_nothing_behind() -> None:
    source, sink = MemorySource(one_event_frames()), StuckSink(free=3)
    running = asyncio.create_task(Runtime(new_engine(), [source], [sink]).run())
    await eventually(lambda: sink.stats.messages == 3)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert source.num_acknowledged == 3
    assert sink._closed


async def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigError, match="expected a source and a sink, found 0 and 1"):
        Runtime(new_engine(), [], [MemorySink()])
    with pytest.raises(ConfigError, match="found 1 and 0"):
        Runtime(new_engine(), [MemorySource()], [])
    with pytest.raises(ConfigError, match="in_flight: expected >= 1, found 0"):
        Runtime(new_engine(), [MemorySource()], [MemorySink()], in_flight=0)


async def test_a_connector_that_cannot_be_set_up_closes_the_others() -> None:
    taken = f"tcp://127.0.0.1:{free_port()}"
    async with ZmqSource("pull", [taken], bind=True):
        first, sink = MemorySource(), MemorySink()
        with pytest.raises(ConnectError, match=r"cannot bind .* choose another port"):
            await Runtime(new_engine(), [first, ZmqSource("pull", [taken], bind=True)], [sink]).run()
        assert first._closed
        assert sink._closed
    late = Faulty(MemorySource(), "enter", 1, OSError("no route to host"))
    with pytest.raises(ConnectError, match="faulty memory: no route to host"):
        await Runtime(new_engine(), [late], [MemorySink()]).run()


async def test_where_it_listens_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "streamattn")
    source = ZmqSource("pull", ["tcp://127.0.0.1:0"], bind=True)
    runtime = Runtime(new_engine(), [source], [MemorySink()])
    running = asyncio.create_task(runtime.run())
    await eventually(lambda: "sink ready: memory" in caplog.text)
    assert f"source ready: zmq+pull tcp://127.0.0.1:0 at {source.endpoints[0]}" in caplog.text
    assert not source.endpoints[0].endswith(("*", ":0"))
    runtime.stop()
    await running


# --- faults, injected everywhere -------------------------------------------------------------------------------------

ERRORS = [ConnectorError("cable cut"), OSError("I/O error"), RuntimeError("a bug")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
async def test_the_nth_receive_fails(error: Exception) -> None:
    for n in range(1, 12):
        bad = Faulty(MemorySource(one_event_frames(["s0"], 10)), "frames", n, error)
        good, sink = MemorySource(one_event_frames(["s1"])), MemorySink()
        for source in (bad.inner, good):
            source.end()
        stats = await Runtime(new_engine(), [bad, good], [sink]).run()
        messages = sink.take()
        check_answers(messages, "s1")
        assert stats.answered == 40 + min(n - 1, 10)
        assert stats.failed == ([f"faulty memory: {error}"] if n <= 10 else [])
        assert bad.inner.num_acknowledged == min(n - 1, 10)
        assert bad.closed == 1
        check_books(stats)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
async def test_the_nth_send_fails(error: Exception) -> None:
    for n in range(1, 12):
        bad, good = Faulty(MemorySink(), "send", n, error), MemorySink()
        source = MemorySource(one_event_frames(["s0"], 10))
        source.end()
        stats = await Runtime(new_engine(), [source], [bad, good]).run()
        check_answers(good.take(), "s0", 10)
        assert len(bad.inner.take()) == min(n - 1, 10)
        assert stats.failed == ([f"faulty memory: {error}"] if n <= 10 else [])
        assert source.num_acknowledged == stats.answered == 10
        assert bad.closed == 1


async def test_the_nth_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(1, 8):
        engine = new_engine(chunk=1, max_chunk=1)
        calls = 0
        forward = engine._forward

        def failing(*arguments: Any, n: int = n, forward: Any = forward) -> Any:
            nonlocal calls
            calls += 1
            if calls == n:
                raise RuntimeError("device lost")
            return forward(*arguments)

        monkeypatch.setattr(engine, "_forward", failing)
        messages, runtime = await run_over(engine, *one_event_frames(["s0"], 6))
        stats = runtime.stats
        assert faults(messages) == ([("s0", 0, "internal")] if n <= 6 else [])
        assert stats.answered >= n - 1  # what came before the failure stands
        assert stats.answered + stats.dropped["failed"] == 6
        assert stats.failed == []


@pytest.mark.parametrize("method", ["exit", "close"])
async def test_a_failure_to_close_is_reported_and_the_others_are_closed(method: str) -> None:
    bad, other, sink = Faulty(MemorySource(), method, 1), MemorySource(), MemorySink()
    runtime = Runtime(new_engine(), [bad, other], [sink])
    running = asyncio.create_task(runtime.run())
    await other.put(one_event_frames(["s0"], 1)[0])
    await sink.get()
    runtime.stop()
    if method == "close":
        await eventually(lambda: runtime.stats.failed != [])
        bad.inner.end()  # its iteration ends after all
    assert (await running).failed == ["faulty memory: cable cut"]
    assert (other._closed, sink._closed) == (True, True)


async def test_without_any_source_or_sink_it_fails() -> None:
    sources = [Faulty(MemorySource(one_event_frames([s])), "frames", 3) for s in ("s0", "s1")]
    sink = MemorySink()
    with pytest.raises(ConnectorError, match="faulty memory: cable cut; faulty memory: cable cut"):
        await Runtime(new_engine(), sources, [sink]).run()
    assert len(sink.take()) == 4  # what had been read is answered
    waiting, ended = MemorySource(one_event_frames()), MemorySource(one_event_frames())
    ended.end()
    for source in (waiting, ended):
        runtime = Runtime(new_engine(), [source], [Faulty(MemorySink(), "send", 7), Faulty(MemorySink(), "send", 2)])
        with pytest.raises(ConnectorError, match="cable cut"):
            await runtime.run()
        assert source.num_acknowledged == 6
        check_books(runtime.stats)
        assert runtime.stats.dropped["undelivered"] == runtime.stats.frames - 6


async def test_an_engine_that_stops_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine()
    source, sink = MemorySource(one_event_frames(["s0"], 3)), MemorySink()  # it does not end by itself
    monkeypatch.setattr(engine.scheduler, "next_batch", lambda _: 1 / 0)
    with pytest.raises(EngineError, match="division by zero"):
        await Runtime(engine, [source], [sink]).run()
    assert source.num_acknowledged == 0


async def test_an_error_of_the_caller_is_the_callers() -> None:
    source = MemorySource(one_event_frames(["s0"], 3))

    def broken(_: RuntimeStats) -> None:
        raise ValueError("no such widget")

    with pytest.raises(ValueError, match="no such widget"):
        await Runtime(new_engine(), [source], [MemorySink()], on_progress=broken).run()
