"""Engine and AsyncEngine: answers, order, isolation, marks, faults, start and stop."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch
from helpers_engine import FEATURES, VOCAB, expected_logits, make_frame, random_events, small_model

from streamattn.async_engine import AsyncEngine
from streamattn.engine import Engine, Outcome
from streamattn.errors import ConfigError, EngineError, FrameError, OverloadError, StreamError
from streamattn.frame import LATE, Control, Fault, Heartbeat, Reply, Result
from streamattn.scheduler import Admission, Policy

TOLERANCE = 2e-5


class Clock:
    """Monotonic time that moves when told to."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


def run_all(engine: Engine) -> list[Outcome]:
    outcomes = []
    while engine.busy:
        outcomes += engine.step()
    return outcomes


def results(outcomes: list[Outcome], stream: str) -> list[Result]:
    return [m for o in outcomes for m in o.messages if isinstance(m, Result) and m.stream == stream]


def test_pushes_of_any_size_give_the_parallel_answer() -> None:
    model = small_model()
    ids, features = random_events(300)
    stream = Engine(model, lanes=2).open("a")
    found, at = [], 0
    for size in (1, 1, 5, 1, 92, 200):
        result = stream.push(ids[at : at + size], features[at : at + size], event_ns=77)
        assert (result.stream, result.sequence, result.num_events, result.event_ns) == ("a", at, size, 77)
        assert result.arrival_ns <= result.start_ns <= result.end_ns
        assert result.heads["gap"].shape == (size, 2)
        found.append(result.heads["next"])
        at += size
    np.testing.assert_allclose(np.concatenate(found), expected_logits(model, ids, features), rtol=0, atol=TOLERANCE)
    assert stream.position == 300


def test_many_desynchronised_streams_share_steps() -> None:
    model = small_model()
    engine = Engine(model, lanes=5, policy=Policy(chunk=16, max_chunk=64, step_tokens=48))
    streams = {f"s{i}": random_events(40 + 30 * i, seed=i) for i in range(5)}
    generator = np.random.default_rng(0)
    for name in streams:
        engine.open(name)
    at = dict.fromkeys(streams, 0)
    outcomes: list[Outcome] = []
    while any(at[name] < len(ids) for name, (ids, _) in streams.items()):
        for name, (ids, features) in streams.items():
            size = min(int(generator.choice([0, 1, 1, 3, 25])), len(ids) - at[name])
            if size:
                part = slice(at[name], at[name] + size)
                assert engine.offer(make_frame(name, at[name], ids[part], features[part]), name) is Admission.ACCEPTED
                at[name] += size
        outcomes += engine.step()
    outcomes += run_all(engine)
    for name, (ids, features) in streams.items():
        mine = results(outcomes, name)
        assert [r.sequence for r in mine] == sorted(r.sequence for r in mine)
        assert sum(r.num_events for r in mine) == len(ids)
        found = np.concatenate([r.heads["next"] for r in mine])
        np.testing.assert_allclose(found, expected_logits(model, ids, features), rtol=0, atol=TOLERANCE)
    engine.scheduler.check_integrity()


def test_answers_for_the_last_event_only_or_for_none() -> None:
    model = small_model()
    ids, features = random_events(100)
    wanted = expected_logits(model, ids, features)
    stream = Engine(model, policy=Policy(chunk=7, max_chunk=7)).open("a")
    silent = stream.push(ids[:50], features[:50], answer="none")
    assert silent.heads == {}
    last = stream.push(ids[50:], features[50:], answer="last")
    assert last.num_events == 50
    np.testing.assert_allclose(last.heads["next"], wanted[-1:], rtol=0, atol=TOLERANCE)


def test_lanes_are_reserved_or_refused_and_come_back() -> None:
    engine = Engine(small_model(), lanes=2)
    first, second = engine.open("a"), engine.open("b")
    with pytest.raises(OverloadError, match="no free lane"):
        engine.open("c")
    with pytest.raises(ConfigError, match="'a'"):
        engine.open("a")
    before = engine.cache_bytes
    ids, features = random_events(30)
    first.push(ids, features)
    first.close()
    third = engine.open("c")
    assert third.lane == first.lane
    np.testing.assert_allclose(  # nothing of the stream before shows
        third.push(ids[:9], features[:9]).heads["next"],
        second.push(ids[:9], features[:9]).heads["next"],
        rtol=0,
        atol=TOLERANCE,
    )
    with pytest.raises(StreamError, match="closed"):
        first.push(ids[:1], features[:1])
    assert engine.cache_bytes == before


def test_rollback_is_exact() -> None:
    ids, features = random_events(60)
    engine = Engine(small_model(), lanes=1, marks=2)
    stream = engine.open("a")
    stream.push(ids[:20], features[:20])
    mark = stream.mark()
    first = [stream.push(ids[i], features[i]).heads["next"] for i in range(20, 40)]
    stream.push(ids[40:], features[40:])
    stream.rollback(mark)
    assert stream.position == 20
    again = [stream.push(ids[i], features[i]).heads["next"] for i in range(20, 40)]
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(again))
    assert stream.sequence == 80  # inputs are numbered on: they never rewind
    stream.mark()
    with pytest.raises(OverloadError, match="found all in use"):
        stream.mark()
    with pytest.raises(ConfigError, match="rollback: expected a mark of stream 'a', found 7"):
        stream.rollback(7)
    stream.close()
    other = engine.open("b")
    with pytest.raises(ConfigError, match="rollback: expected a mark of stream 'b'"):
        other.rollback(mark)


def test_reset_forgets() -> None:
    ids, features = random_events(40)
    stream = Engine(small_model()).open("a")
    first = stream.push(ids, features).heads["next"]
    stream.reset()
    np.testing.assert_array_equal(stream.push(ids, features).heads["next"], first)


@pytest.mark.parametrize(
    ("ids", "features", "message"),
    [
        (None, np.zeros((1, FEATURES)), "ids: expected some"),
        ([1], None, "features: expected some"),
        ([VOCAB], np.zeros((1, FEATURES)), f"ids: expected 0 to {VOCAB - 1}"),
        ([-1], np.zeros((1, FEATURES)), "ids: expected 0 to"),
        ([0.5], np.zeros((1, FEATURES)), "ids: expected integers"),
        ([1], np.zeros((1, 2)), r"features: expected shape \[1, 3\], found \[1, 2\]"),
        ([1], np.full((1, FEATURES), np.nan), "features: expected finite floats"),
        ([], np.zeros((0, FEATURES)), "ids: expected integers of shape"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(ids, features, message: str) -> None:
    stream = Engine(small_model()).open("a")
    with pytest.raises(FrameError, match=message):
        stream.push(ids, features)
    assert stream.position == 0
    good_ids, good_features = random_events(3)
    assert stream.push(good_ids, good_features).num_events == 3


def test_a_nan_ends_its_stream_and_no_other() -> None:
    model = small_model()
    engine = Engine(model, lanes=2)
    good, bad = engine.open("good"), engine.open("bad")
    ids, features = random_events(40)
    wanted = expected_logits(model, ids, features)
    found = [good.push(ids[:10], features[:10]).heads["next"]]
    huge = np.full((1, FEATURES), 3e38, np.float32)
    engine.offer(make_frame("good", 10, ids[10:11], features[10:11]), "good")
    engine.offer(make_frame("bad", 0, ids[:1], huge), "bad")
    outcomes = run_all(engine)
    found.append(results(outcomes, "good")[0].heads["next"])
    faults = [m for o in outcomes for m in o.messages if isinstance(m, Fault)]
    assert [(f.stream, f.code) for f in faults] == [("bad", "internal")]
    assert engine.faults == 1
    with pytest.raises(StreamError, match="closed"):
        bad.push(ids[:1], features[:1])
    good.sequence = 11
    found.append(good.push(ids[11:], features[11:]).heads["next"])
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=0, atol=TOLERANCE)
    reborn = engine.open("bad")  # the NaNs that the lane still holds are out of reach
    np.testing.assert_allclose(reborn.push(ids, features).heads["next"], wanted, rtol=0, atol=TOLERANCE)
    engine.scheduler.check_integrity()


def test_a_raising_step_ends_its_streams_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    engine = Engine(model, lanes=3)
    ids, features = random_events(20)
    a, b = engine.open("a"), engine.open("b")
    b.push(ids[:5], features[:5])

    def broken(*_: object) -> None:
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(model.blocks[1], "forward", broken)
        with pytest.raises(StreamError, match="stream 'a': step failed: device lost"):
            a.push(ids, features)
    wanted = expected_logits(model, ids, features)
    np.testing.assert_allclose(b.push(ids[5:], features[5:]).heads["next"], wanted[5:], rtol=0, atol=TOLERANCE)
    again = engine.open("a")
    np.testing.assert_allclose(again.push(ids, features).heads["next"], wanted, rtol=0, atol=TOLERANCE)
    engine.scheduler.check_integrity()


def test_late_results_say_so_and_gaps_are_named() -> None:
    clock = Clock()
    engine = Engine(small_model(), clock=clock)
    engine.open("a")
    ids, features = random_events(10)
    engine.offer(make_frame("a", 5, ids[:1], features[:1], deadline_ns=100), "punctual")
    (punctual,) = results(run_all(engine), "a")
    clock.now = 101
    engine.offer(make_frame("a", 8, ids[1:2], features[1:2], deadline_ns=100), "late")
    (late,) = results(run_all(engine), "a")
    assert (punctual.late, punctual.missing) == (False, 0)
    assert (late.late, late.missing) == (True, 2)
    assert late.flags & LATE
    assert engine.offer(make_frame("a", 8, ids[1:2], features[1:2]), "again") is Admission.DROPPED
    (outcome,) = run_all(engine)
    assert (outcome.tag, outcome.messages) == ("again", ())
    assert "duplicate" in outcome.reason


def test_expired_frames_are_not_computed() -> None:
    clock = Clock()
    engine = Engine(small_model(), policy=Policy(deadline_ns=10, on_deadline="expired"), clock=clock)
    stream = engine.open("a")
    ids, features = random_events(2)
    engine.offer(make_frame("a", 0, ids[:1], features[:1]), "old")
    clock.now = 50
    engine.offer(make_frame("a", 1, ids[1:], features[1:], arrival_ns=50), "new")
    outcomes = run_all(engine)
    assert sorted((o.tag, o.reason) for o in outcomes) == [("new", ""), ("old", "expired")]
    assert stream.position == 1


def test_warmup_leaves_no_trace() -> None:
    ids, features = random_events(30)
    cold, warm = Engine(small_model(), lanes=3), Engine(small_model(), lanes=3)
    warm.warmup()
    for engine in (cold, warm):
        engine.open("a")
    answers = [e.streams["a"].push(ids, features).heads["next"] for e in (cold, warm)]
    np.testing.assert_array_equal(answers[0], answers[1])
    with pytest.raises(EngineError, match="warmup: expected no open stream"):
        warm.warmup()


def test_controls_act_in_order_with_data() -> None:
    engine = Engine(small_model(), auto_open=True, marks=1)
    ids, features = random_events(30)
    engine.offer(make_frame("a", 0, ids[:10], features[:10]), 0)
    engine.offer(Control("a", 1, "mark", request=1), 1)
    engine.offer(make_frame("a", 10, ids[10:20], features[10:20]), 2)
    engine.offer(Control("a", 1, "rollback", request=3, value=0), 3)
    engine.offer(make_frame("a", 20, ids[10:20], features[10:20]), 4)
    engine.offer(Control("a", 1, "rollback", request=5, value=9), 5)
    engine.offer(Control("a", 1, "close", request=6), 6)
    by_tag = {o.tag: o.messages[0] for o in run_all(engine)}
    assert by_tag[1] == Reply("a", 1, 1, 0)
    assert by_tag[3] == Reply("a", 1, 3, 10)
    assert isinstance(by_tag[2], Result)
    assert isinstance(by_tag[4], Result)
    np.testing.assert_allclose(by_tag[2].heads["next"], by_tag[4].heads["next"], rtol=0, atol=TOLERANCE)
    assert isinstance(by_tag[5], Fault)
    assert by_tag[6] == Reply("a", 1, 6, 20)
    assert engine.streams == {}


def test_what_follows_a_close_and_an_open_is_a_new_stream() -> None:
    model = small_model()
    engine = Engine(model, lanes=1)
    ids, features = random_events(20)
    engine.offer(Control("a", 0, "open", request=1), 1)
    engine.offer(make_frame("a", 0, ids, features), 2)
    engine.offer(Control("a", 0, "open", request=3), 3)
    engine.offer(Control("a", 0, "close", request=4), 4)
    engine.offer(make_frame("a", 20, ids, features), 5)
    engine.offer(Control("a", 0, "open", request=6), 6)
    engine.offer(make_frame("a", 40, ids, features), 7)  # the producer's numbers go on
    outcomes = {o.tag: o for o in run_all(engine)}
    replies = {tag: o.messages[0] for tag, o in outcomes.items() if o.messages and isinstance(o.messages[0], Reply)}
    assert {tag: reply.value for tag, reply in replies.items() if isinstance(reply, Reply)} == {
        1: 0,
        3: 20,
        4: 20,
        6: 0,
    }
    assert (outcomes[5].reason, outcomes[5].messages) == ("closed", ())
    first, again = (outcomes[tag].messages[0] for tag in (2, 7))
    assert isinstance(first, Result)
    assert isinstance(again, Result)
    np.testing.assert_array_equal(first.heads["next"], again.heads["next"])
    engine.scheduler.check_integrity()


# --- AsyncEngine -----------------------------------------------------------------------------------------------------


async def test_async_streams_in_parallel_equal_the_parallel_form() -> None:
    model = small_model()
    data = {f"s{i}": random_events(60, seed=i) for i in range(4)}

    async def one(running: AsyncEngine, name: str) -> np.ndarray:
        ids, features = data[name]
        stream = await running.open(name)
        answers = [await stream.push(ids[i : i + 4], features[i : i + 4]) for i in range(0, 60, 4)]
        await stream.close()
        return np.concatenate([a.heads["next"] for a in answers])

    async with AsyncEngine(Engine(model, lanes=4)) as running:
        found = await asyncio.gather(*(one(running, name) for name in data))
    for name, answer in zip(data, found, strict=True):
        np.testing.assert_allclose(answer, expected_logits(model, *data[name]), rtol=0, atol=TOLERANCE)
    assert not [t for t in threading.enumerate() if t.name == "streamattn-engine"]


async def test_offers_wait_while_there_is_no_room() -> None:
    ids, features = random_events(200)
    outcomes: list[Outcome] = []
    async with AsyncEngine(Engine(small_model(), policy=Policy(queue_events=4)), capacity=8) as running:
        await running.open("a")
        for i in range(200):
            await running.offer(make_frame("a", i, ids[i : i + 1], features[i : i + 1]), outcomes.append)
            assert i + 1 - len(outcomes) <= 8
    assert [o.messages[0].sequence for o in outcomes if isinstance(o.messages[0], Result)] == list(range(200))


async def test_async_errors_reach_their_caller() -> None:
    ids, features = random_events(5)
    async with AsyncEngine(Engine(small_model(), lanes=1, marks=1)) as running:
        stream = await running.open("a")
        with pytest.raises(OverloadError, match="no free lane"):
            await running.open("b")
        with pytest.raises(FrameError, match="ids: expected 0 to"):
            await stream.push([99], features[:1])
        mark = await stream.mark()
        first = await stream.push(ids, features)
        await stream.rollback(mark)
        again = await stream.push(ids, features)
        np.testing.assert_array_equal(first.heads["next"], again.heads["next"])
        with pytest.raises(ConfigError, match="rollback"):
            await stream.rollback(5)
        await running.offer(Heartbeat("a", 0, 5, 0), lambda _: None)
    with pytest.raises(EngineError, match="is stopped"):
        await stream.push(ids, features)


async def test_refused_input_leaves_no_gap_and_dropped_commands_say_so() -> None:
    ids, features = random_events(2)
    async with AsyncEngine(Engine(small_model())) as running:
        stream = await running.open("a")
        await stream.push(ids[:1], features[:1])
        with pytest.raises(FrameError):
            await stream.push([99], features[:1])
        result = await stream.push(ids[1:], features[1:])
        assert (result.sequence, result.missing, result.flags) == (1, 0, 0)
        closed, marked = await asyncio.gather(stream.close(), stream.mark(), return_exceptions=True)
        assert closed is None
        assert isinstance(marked, EngineError)


async def test_leaving_early_stops_the_thread_and_answers_everyone() -> None:
    ids, features = random_events(1)
    outcomes: list[Outcome] = []

    async def leave() -> None:
        async with AsyncEngine(Engine(small_model())) as running:
            await running.open("a")
            for i in range(50):
                await running.offer(make_frame("a", i, ids, features), outcomes.append)
            raise RuntimeError("away")

    with pytest.raises(RuntimeError, match="away"):
        await leave()
    await asyncio.sleep(0)
    assert len(outcomes) == 50
    assert {o.reason for o in outcomes} <= {"", "stopped"}
    assert not [t for t in threading.enumerate() if t.name == "streamattn-engine"]


async def test_an_internal_error_hangs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, features = random_events(1)
    engine = Engine(small_model())
    async with AsyncEngine(engine) as running:
        stream = await running.open("a")

        def broken(_: int) -> None:
            raise AssertionError("impossible")

        monkeypatch.setattr(engine.scheduler, "next_batch", broken)
        with pytest.raises(EngineError, match="impossible"):
            await stream.push(ids, features)
        with pytest.raises(EngineError):
            await running.open("b")


def test_float64_models_answer_in_float32() -> None:
    ids, features = random_events(3)
    result = Engine(small_model(dtype=torch.float64)).open("a").push(ids, features)
    assert result.heads["next"].dtype == np.float32
