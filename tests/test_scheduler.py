"""Scheduler with an injected clock: numbering, queues, deadlines, fairness, accounting. Nothing here needs a model."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from streamattn.errors import ConfigError, EngineError, FrameError, OverloadError
from streamattn.frame import Control, Frame, Heartbeat
from streamattn.scheduler import (
    COMPANY_BATCHES,
    MAX_WAITING_CONTROLS,
    Admission,
    Batch,
    Done,
    Pending,
    Policy,
    Row,
    Scheduler,
    Tally,
)

ACCEPTED, BLOCKED, DROPPED = Admission.ACCEPTED, Admission.BLOCKED, Admission.DROPPED
NEVER = 2**63 - 1


def frame(stream: str, sequence: int, n: int = 1, *, epoch: int = 0, **options: Any) -> Frame:
    ids = np.arange(sequence, sequence + n, dtype=np.int32)
    return Frame(stream, epoch, sequence, 1000, ids, **options)


def scheduler(*streams: str, lanes: int | None = None, **policy: Any) -> Scheduler:
    made = Scheduler(lanes or len(streams), Policy(**policy))
    for stream in streams:
        made.open(stream)
    return made


def offer(made: Scheduler, item: Frame | Control | Heartbeat, now_ns: int = 0, tag: object = None) -> Admission:
    """Offer and hold the books against the queues."""
    try:
        return made.offer(item, now_ns, tag)
    finally:
        made.check_integrity()


def step(made: Scheduler, now_ns: int = 0) -> tuple[Batch | None, list[Done]]:
    batch = made.next_batch(now_ns)
    made.check_integrity()
    done = [] if batch is None else made.commit(batch, now_ns)
    made.check_integrity()
    return batch, done


def run(made: Scheduler, now_ns: int = 0) -> list[Done]:
    """Run steps until nothing waits."""
    finished: list[Done] = []
    while True:
        batch, done = step(made, now_ns)
        if batch is None:
            return finished
        finished += done


def tokens(batch: Batch | None) -> dict[str, int]:
    assert batch is not None
    return {row.stream: row.num_tokens for row in batch.rows}


def dropped(made: Scheduler) -> list[tuple[object, str]]:
    return [(drop.tag, drop.reason) for drop in made.take_dropped()]


# --- policy and lanes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue_events": 0}, "queue_events: expected an integer >= 1, found 0"),
        ({"chunk": 1.5}, "chunk: expected an integer >= 1, found 1.5"),
        ({"step_tokens": True}, "step_tokens: expected an integer >= 1, found True"),
        ({"max_chunk": -1}, "max_chunk: expected an integer >= 1, found -1"),
        ({"deadline_ns": 0}, "deadline_ns: expected an integer >= 1, found 0"),
        ({"overflow": "explode"}, "overflow: expected one of .*'drop_oldest'.*, found 'explode'"),
        ({"on_deadline": "never"}, "on_deadline: expected one of .*'late'.*, found 'never'"),
        ({"chunk": 300}, "chunk: expected at most max_chunk = 256, found 300"),
    ],
)
def test_impossible_policies_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Policy(**options)


def test_lanes_are_reserved_refused_and_freed() -> None:
    made = Scheduler(2)
    assert [made.open("a"), made.open("b")] == [0, 1]
    with pytest.raises(ConfigError, match="stream 'a': expected a new stream, found it open already"):
        made.open("a")
    with pytest.raises(OverloadError, match="no free lane: all 2 lanes are in use; close a stream or raise lanes"):
        made.open("c")
    assert made.close("a", 0) == 0
    assert made.open("c") == 0
    assert made.fail("b", 0) == 1
    assert made.open("a") == 1
    made.check_integrity()
    with pytest.raises(ConfigError, match="lanes: expected an integer >= 1, found 0"):
        Scheduler(0)


@pytest.mark.parametrize("item", [frame("x", 0), Control("x", 0, "mark"), Heartbeat("x", 0, 1, 0)])
def test_unknown_streams_are_refused(item: Frame | Control | Heartbeat) -> None:
    made = scheduler("a")
    with pytest.raises(EngineError, match="stream 'x': not open"):
        made.offer(item, 0)
    with pytest.raises(EngineError, match="stream 'x': not open"):
        made.close("x", 0)
    with pytest.raises(EngineError, match="stream 'x': not open"):
        made.fail("x", 0)
    assert made.pending() == 0


def test_empty_frames_are_refused() -> None:
    made = scheduler("a")
    with pytest.raises(FrameError, match="frame: expected at least one event, found none, in stream 'a'"):
        made.offer(Frame("a", 0, 0, 0), 0)
    assert made.counters.to_dict() == Scheduler(1).counters.to_dict()


# --- numbering -------------------------------------------------------------------------------------------------------


def test_first_frame_sets_the_expectation() -> None:
    made = scheduler("a")
    offer(made, frame("a", 700))
    offer(made, frame("a", 701))
    assert [done.missing for done in run(made)] == [0, 0]
    assert made.counters.gaps == 0


def test_gaps_are_counted_and_attached() -> None:
    made = scheduler("a")
    for sequence, n in ((0, 2), (5, 1), (6, 1), (7, 1), (10, 3)):
        assert offer(made, frame("a", sequence, n)) is ACCEPTED
    assert [done.missing for done in run(made)] == [0, 3, 0, 0, 2]
    assert (made.counters.gaps, made.counters.missing_events) == (2, 5)


def test_duplicates_are_dropped_whole() -> None:
    made = scheduler("a")
    offer(made, frame("a", 0, 5), tag="first")
    assert offer(made, frame("a", 3, 2), tag="again") is DROPPED
    assert offer(made, frame("a", 0, 5), tag="once more") is DROPPED
    assert dropped(made) == [("again", "duplicate"), ("once more", "duplicate")]
    assert dropped(made) == []
    assert [done.tag for done in run(made)] == ["first"]
    assert made.counters.refused["duplicate"] == Tally(2, 7)
    assert made.counters.duplicates == 7
    assert made.counters.accepted == Tally(1, 5)


def test_a_seen_head_is_sliced_off() -> None:
    made = scheduler("a")
    offer(made, frame("a", 0, 4))
    features = np.arange(10, dtype=np.float32).reshape(5, 2)
    overlapping = frame("a", 2, 5, features=features, offsets_ns=np.array([0, 3, 7, 9, 20]), arrival_ns=9)
    assert offer(made, overlapping, tag="tail") is ACCEPTED
    assert offer(made, frame("a", 5, 5), tag="no times") is ACCEPTED
    _, tail, timeless = run(made)
    assert (tail.tag, tail.missing, tail.frame.sequence, tail.frame.event_ns) == ("tail", 0, 4, 1007)
    assert tail.frame.arrival_ns == 9
    assert tail.frame.ids is not None
    assert tail.frame.features is not None
    assert tail.frame.offsets_ns is not None
    assert tail.frame.ids.tolist() == [4, 5, 6]
    assert tail.frame.features.tolist() == features[2:].tolist()
    assert tail.frame.offsets_ns.tolist() == [0, 2, 13]
    assert (timeless.frame.sequence, timeless.frame.event_ns, len(timeless.frame)) == (7, 1000, 3)
    assert made.counters.refused["duplicate"] == Tally(0, 4)
    assert (made.counters.accepted, made.counters.answered) == (Tally(3, 10), Tally(3, 10))
    assert dropped(made) == []


def test_epochs() -> None:
    made = scheduler("a")
    offer(made, frame("a", 10, epoch=3))
    assert offer(made, frame("a", 0, epoch=4)) is ACCEPTED  # a restart counts from 0 again
    assert offer(made, frame("a", 50, epoch=9)) is ACCEPTED  # or goes on: nothing can be said about what is missing
    assert offer(made, frame("a", 11, epoch=4), tag="old") is DROPPED
    assert offer(made, frame("a", 52, epoch=9)) is ACCEPTED
    assert [(done.frame.epoch, done.missing) for done in run(made)] == [(3, 0), (4, 0), (9, 0), (9, 1)]
    assert made.counters.epochs == 2
    assert made.counters.refused["stale_epoch"] == Tally(1, 1)
    assert dropped(made) == [("old", "stale_epoch")]


def test_heartbeats_show_the_loss_of_the_last_events() -> None:
    made = scheduler("a")
    assert offer(made, Heartbeat("a", 0, 99, 0)) is ACCEPTED  # before any frame: no expectation yet
    offer(made, frame("a", 0, 3))
    offer(made, Heartbeat("a", 0, 3, 0))
    offer(made, Heartbeat("a", 0, 2, 0))
    offer(made, Heartbeat("a", 1, 90, 0))  # another epoch's
    assert made.counters.gaps == 0
    offer(made, Heartbeat("a", 0, 5, 0))
    offer(made, Heartbeat("a", 0, 5, 0))
    assert (made.counters.gaps, made.counters.missing_events) == (1, 2)
    offer(made, Heartbeat("a", 0, 6, 0))
    offer(made, frame("a", 8))
    offer(made, frame("a", 9))
    assert offer(made, frame("a", 4)) is DROPPED  # too late
    assert [done.missing for done in run(made)] == [0, 5, 0]
    assert (made.counters.gaps, made.counters.missing_events) == (3, 5)


# --- overflow --------------------------------------------------------------------------------------------------------


def test_block_hands_the_frame_back_and_moves_nothing() -> None:
    made = scheduler("a", queue_events=4)
    offer(made, frame("a", 0, 3))
    before = made.counters.to_dict()
    assert offer(made, frame("a", 5, 2)) is BLOCKED
    assert offer(made, frame("a", 2, 3)) is BLOCKED  # the head was seen, but two are new
    assert made.counters.to_dict() == {**before, "blocked": 2}
    assert offer(made, frame("a", 2, 2)) is ACCEPTED  # one new event fits
    run(made)
    assert offer(made, frame("a", 5, 2)) is ACCEPTED
    assert run(made)[0].missing == 1
    assert dropped(made) == []


def test_a_longer_frame_fits_into_an_empty_queue_and_leaves_it_when_it_is_started() -> None:
    made = scheduler("a", "b", queue_events=4, chunk=2, max_chunk=2)
    assert offer(made, frame("a", 0, 100)) is ACCEPTED
    assert offer(made, frame("a", 100, 1)) is BLOCKED
    step(made)
    assert offer(made, frame("a", 100, 4)) is ACCEPTED
    assert offer(made, frame("a", 104, 1)) is BLOCKED
    assert offer(made, frame("b", 0, 4)) is ACCEPTED  # queues are a stream's own


def test_reject_raises_and_the_frame_may_come_again() -> None:
    made = scheduler("a", queue_events=4, overflow="reject")
    offer(made, frame("a", 0, 3))
    with pytest.raises(OverloadError, match="stream 'a': expected room for 2 events, found 3 of 4 waiting"):
        offer(made, frame("a", 3, 2))
    assert (made.counters.rejected, made.counters.refused["rejected"]) == (1, Tally(1, 2))
    assert made.counters.accepted == Tally(1, 3)
    run(made)
    assert offer(made, frame("a", 3, 2)) is ACCEPTED
    assert run(made)[0].missing == 0
    assert dropped(made) == []


def test_drop_oldest_makes_room_and_never_touches_what_is_started() -> None:
    made = scheduler("a", queue_events=4, overflow="drop_oldest", chunk=2, max_chunk=2)
    offer(made, frame("a", 0, 3), tag="started")
    step(made)
    for sequence, n in ((3, 1), (4, 2), (6, 1), (7, 2)):
        assert offer(made, frame("a", sequence, n), tag=sequence) is ACCEPTED
    assert dropped(made) == [(3, "drop_oldest"), (4, "drop_oldest")]
    assert offer(made, frame("a", 9, 50), tag="long") is ACCEPTED
    assert dropped(made) == [(6, "drop_oldest"), (7, "drop_oldest")]
    assert [(done.tag, done.missing) for done in run(made)] == [("started", 0), ("long", 0)]
    assert made.counters.dropped["drop_oldest"] == Tally(4, 6)
    assert made.counters.gaps == 0


def test_conflate_keeps_the_newest() -> None:
    made = scheduler("a", overflow="conflate", chunk=2, max_chunk=2)
    offer(made, frame("a", 0, 3), tag="started")
    step(made)
    for sequence in (3, 4, 5):
        assert offer(made, frame("a", sequence), tag=sequence) is ACCEPTED
    assert dropped(made) == [(3, "conflate"), (4, "conflate")]
    assert [done.tag for done in run(made)] == ["started", 5]
    assert made.counters.dropped["conflate"] == Tally(2, 2)


@pytest.mark.parametrize("overflow", ["drop_oldest", "conflate"])
def test_frames_of_a_batch_in_flight_are_not_dropped(overflow: str) -> None:
    made = scheduler("a", queue_events=2, overflow=overflow)
    offer(made, frame("a", 0, 2), tag="in flight")
    batch = made.next_batch(0)
    assert batch is not None
    for sequence in (2, 4, 6):
        offer(made, frame("a", sequence, 2), tag=sequence)
    assert [done.tag for done in made.commit(batch, 0)] == ["in flight"]
    assert [tag for tag, _ in dropped(made)] == [2, 4]
    assert [done.tag for done in run(made)] == [6]


def test_what_was_missing_before_a_dropped_frame_is_told_with_the_next_one() -> None:
    made = scheduler("a", queue_events=2, overflow="drop_oldest")
    for sequence in (0, 4, 5, 9):
        offer(made, frame("a", sequence), tag=sequence)
    assert dropped(made) == [(0, "drop_oldest"), (4, "drop_oldest")]
    assert [(done.tag, done.missing) for done in run(made)] == [(5, 3), (9, 3)]
    assert made.counters.missing_events == 6


def test_what_was_missing_before_the_only_waiting_frame_is_not_lost_with_it() -> None:
    made = scheduler("a", overflow="conflate")
    for sequence in (0, 4, 5, 9):
        offer(made, frame("a", sequence), tag=sequence)
    assert [(done.tag, done.missing) for done in run(made)] == [(9, 6)]


# --- deadlines -------------------------------------------------------------------------------------------------------


def test_late_frames_are_computed_and_flagged() -> None:
    made = scheduler("a", deadline_ns=10)
    offer(made, frame("a", 0, arrival_ns=100), 100, "in time")
    offer(made, frame("a", 1, arrival_ns=95), 100, "late")
    offer(made, frame("a", 2, arrival_ns=95, deadline_ns=200), 100, "own deadline")
    offer(made, frame("a", 3), 104, "arrival unknown: now counts")
    batch = made.next_batch(105)
    assert batch is not None
    done = made.commit(batch, 110)
    assert [d.late for d in done] == [False, True, False, False]
    assert {(d.start_ns, d.end_ns) for d in done} == {(105, 110)}
    assert made.counters.late == 1
    assert offer(made, frame("a", 4, arrival_ns=1), 500) is ACCEPTED  # "late" drops nothing
    assert run(made, 500)[0].late


def test_expired_frames_are_dropped_on_arrival_and_when_a_batch_is_formed() -> None:
    made = scheduler("a", deadline_ns=10, on_deadline="expired", chunk=2, max_chunk=2)
    assert offer(made, frame("a", 3, arrival_ns=90), 100, "arrival") is DROPPED
    offer(made, frame("a", 4, 3, arrival_ns=100), 100, "started")
    offer(made, frame("a", 9, arrival_ns=100), 100, "waited")
    offer(made, frame("a", 10, deadline_ns=10**9), 100, "own")
    offer(made, frame("a", 11, deadline_ns=105), 100, "short")
    assert tokens(step(made, 100)[0]) == {"a": 2}
    done = run(made, 110)
    assert [(d.tag, d.late, d.missing) for d in done] == [("started", False, 0), ("own", False, 2)]
    assert dropped(made) == [("arrival", "expired"), ("waited", "expired"), ("short", "expired")]
    assert made.counters.refused["expired"] == Tally(1, 1)
    assert made.counters.dropped["expired"] == Tally(2, 2)
    assert made.counters.gaps == 1


def test_a_batch_of_expired_frames_only_is_none() -> None:
    made = scheduler("a", "b", deadline_ns=10, on_deadline="expired")
    offer(made, frame("a", 0))
    offer(made, frame("b", 0))
    assert made.next_batch(10) is None
    assert [reason for _, reason in dropped(made)] == ["expired"] * 2
    offer(made, frame("a", 1), 20)
    assert [d.frame.sequence for d in run(made, 29)] == [1]


def test_gaps_around_expired_frames_are_not_lost() -> None:
    made = scheduler("a", on_deadline="expired")
    offer(made, frame("a", 0))
    assert offer(made, frame("a", 5, deadline_ns=1), 1) is DROPPED
    offer(made, frame("a", 8, deadline_ns=5), 1, "expires")
    offer(made, frame("a", 9), 1)
    assert [d.missing for d in run(made, 5)] == [0, 6]


# --- controls and streams that end -----------------------------------------------------------------------------------


def test_controls_come_in_order_alone() -> None:
    made = scheduler("a", "b")
    offer(made, frame("a", 0, 2))
    offer(made, Control("a", 0, "mark", request=1), tag="mark")
    offer(made, Control("a", 0, "mark", request=2), tag="mark 2")
    offer(made, frame("a", 2, 2))
    offer(made, frame("a", 4, 2))
    offer(made, frame("b", 0, 40))
    seen = []
    while (batch := step(made)[0]) is not None:
        seen.append((tokens(batch).get("a"), [(item.tag, item.lane, item.control.request) for item in batch.controls]))
    assert seen == [(2, []), (None, [("mark", 0, 1)]), (None, [("mark 2", 0, 2)]), (4, [])]
    assert made.counters.controls == made.counters.controls_done == 2
    assert made.pending() == 0


def test_waiting_controls_are_bounded() -> None:
    for overflow in ("block", "conflate"):
        made = scheduler("a", overflow=overflow)
        for _ in range(MAX_WAITING_CONTROLS):
            assert made.offer(Control("a", 0, "mark"), 0) is ACCEPTED
        if overflow == "block":
            assert offer(made, Control("a", 0, "mark")) is BLOCKED
            assert made.counters.blocked == 1
        else:
            with pytest.raises(OverloadError, match="stream 'a': expected at most 1024 waiting controls"):
                offer(made, Control("a", 0, "mark"))
            assert made.counters.controls_rejected == 1
        step(made)
        assert offer(made, Control("a", 0, "mark")) is ACCEPTED


@pytest.mark.parametrize("reason", ["closed", "failed"])
def test_what_an_ended_stream_had_is_dropped_with_the_reason(reason: str) -> None:
    made = scheduler("a", "b", chunk=2, max_chunk=2)
    offer(made, frame("a", 0, 3), tag="started")
    step(made)
    offer(made, frame("a", 3), tag="waiting")
    offer(made, Control("a", 0, "mark"), tag="control")
    offer(made, frame("b", 0), tag="b")
    assert (made.close if reason == "closed" else made.fail)("a", 77) == 0
    made.check_integrity()
    drops = made.take_dropped()
    assert [(d.tag, d.reason, d.time_ns) for d in drops] == [(t, reason, 77) for t in ("started", "waiting", "control")]
    assert made.counters.dropped[reason] == Tally(2, 4)  # type: ignore[index]
    assert made.counters.controls_dropped == 1
    assert [d.tag for d in run(made)] == ["b"]
    made.open("a")  # it begins anew
    offer(made, frame("a", 0))
    assert run(made)[0].missing == 0


def test_a_stream_that_ends_during_a_step_is_left_out_of_its_commit() -> None:
    made = scheduler("a", "b")
    offer(made, frame("a", 0, 2), tag="a")
    offer(made, frame("b", 0, 2), tag="b")
    batch = made.next_batch(0)
    assert batch is not None
    lane = made.close("a", 0)
    made.check_integrity()
    assert made.open("a again") == lane
    offer(made, frame("a again", 0), tag="new")
    assert [d.tag for d in made.commit(batch, 0)] == ["b"]
    made.check_integrity()
    assert dropped(made) == [("a", "closed")]
    assert [d.tag for d in run(made)] == ["new"]


def test_an_abandoned_batch_is_served_again() -> None:
    made = scheduler("a", "b", "c", chunk=3, max_chunk=3, deadline_ns=50, on_deadline="expired")
    offer(made, frame("a", 0, 2), tag="a0")
    offer(made, frame("a", 2, 3), tag="a2")
    offer(made, frame("b", 0, 2), tag="b")
    offer(made, Control("c", 0, "mark"), tag="c")
    batch = made.next_batch(0)
    assert tokens(batch) == {"a": 3, "b": 2}
    assert batch is not None
    offer(made, frame("b", 2), 30, tag="b1")
    made.abandon(batch)
    made.check_integrity()
    made.fail("b", 0)
    again = made.next_batch(10)
    assert tokens(again) == {"a": 3}
    assert again is not None
    assert not again.controls
    assert [d.tag for d in made.commit(again, 10)] == ["a0"]
    assert [d.tag for d in run(made, 10)] == ["a2"]
    assert sorted(dropped(made), key=str) == [("b", "failed"), ("b1", "failed")]


def test_frames_of_an_abandoned_batch_wait_again_and_can_expire() -> None:
    made = scheduler("a", deadline_ns=50, on_deadline="expired")
    offer(made, frame("a", 0), 0, "old")
    batch = made.next_batch(0)
    assert batch is not None
    offer(made, frame("a", 1), 40, "new")
    made.abandon(batch)
    assert [d.tag for d in run(made, 60)] == ["new"]
    assert dropped(made) == [("old", "expired")]


def test_an_abandoned_frame_does_not_hide_an_expired_one_behind_it() -> None:
    made = scheduler("a", on_deadline="expired")
    offer(made, frame("a", 0, deadline_ns=100), 0, "first")
    batch = made.next_batch(0)
    assert batch is not None
    offer(made, frame("a", 1, deadline_ns=10), 0, "behind")
    made.abandon(batch)
    assert [d.tag for d in run(made, 20)] == ["first"]
    assert dropped(made) == [("behind", "expired")]


def test_only_the_one_batch_in_flight_can_be_committed() -> None:
    made = scheduler("a")
    offer(made, frame("a", 0))
    batch = made.next_batch(0)
    assert batch is not None
    with pytest.raises(AssertionError):
        made.next_batch(0)
    with pytest.raises(AssertionError):
        made.commit(Batch([], [], 0), 0)
    made.commit(batch, 0)
    with pytest.raises(AssertionError):
        made.commit(batch, 0)
    with pytest.raises(AssertionError):
        made.abandon(batch)


def test_pending_and_frames_in_progress() -> None:
    made = scheduler("a", chunk=2, max_chunk=2)
    first, second = frame("a", 0, 3), frame("a", 3, 2)
    offer(made, first)
    offer(made, second)
    offer(made, first)
    offer(made, Control("a", 0, "mark"))
    assert made.pending() == 5 + 1 + 1
    assert made.frames_in_progress() == {id(first), id(second)}
    made.take_dropped()
    step(made)
    assert made.pending() == 5 + 1  # a frame is in flight until its last event
    step(made)
    assert made.pending() == 2 + 1
    assert made.frames_in_progress() == {id(second)}
    run(made)
    assert made.pending() == 0
    assert made.frames_in_progress() == set()


def test_counters_as_a_dictionary() -> None:
    made = scheduler("a", "b", chunk=1, max_chunk=1)
    offer(made, frame("a", 0, 2))
    offer(made, frame("b", 0, 1))
    step(made)
    numbers = made.counters.to_dict()
    assert numbers["accepted"] == {"frames": 2, "events": 3}
    assert numbers["answered"] == {"frames": 1, "events": 1}
    assert numbers["in_flight"] == {"frames": 1, "events": 2}
    assert numbers["dropped"]["expired"] == numbers["refused"]["duplicate"] == {"frames": 0, "events": 0}
    assert numbers["gaps"] == 0


# --- forming batches -------------------------------------------------------------------------------------------------


def test_a_row_spans_waiting_frames() -> None:
    made = scheduler("a", max_chunk=5, chunk=5)
    for sequence, n in ((0, 2), (2, 1), (3, 4)):
        offer(made, frame("a", sequence, n))
    batch, done = step(made)
    assert batch is not None
    (row,) = batch.rows
    assert [(p.entry.frame.sequence, p.start, p.stop) for p in row.pieces] == [(0, 0, 2), (2, 0, 1), (3, 0, 2)]
    assert [d.frame.sequence for d in done] == [0, 2]
    batch, done = step(made)
    assert batch is not None
    assert [(p.entry.frame.sequence, p.start, p.stop) for p in batch.rows[0].pieces] == [(3, 2, 4)]
    assert [d.frame.sequence for d in done] == [3]


def test_chunks_are_short_in_company_and_long_alone() -> None:
    made = scheduler("a", "b", chunk=4, max_chunk=16)
    offer(made, frame("a", 0, 1900))
    assert tokens(step(made)[0]) == {"a": 16}
    offer(made, frame("b", 0))
    assert tokens(step(made)[0]) == {"b": 1}
    assert tokens(step(made)[0]) == {"a": 4}
    found = [tokens(step(made)[0])["a"] for _ in range(COMPANY_BATCHES + 1)]
    assert found == [4] * COMPANY_BATCHES + [16]


def test_a_control_of_another_stream_is_company_too() -> None:
    made = scheduler("a", "b", chunk=4, max_chunk=16)
    offer(made, frame("a", 0, 40))
    offer(made, Control("b", 0, "mark"))
    assert tokens(step(made)[0]) == {"a": 4}


def test_everyone_gets_a_token_before_the_rest_is_dealt() -> None:
    made = scheduler("a", "b", "c", chunk=8, max_chunk=8, step_tokens=10)
    offer(made, frame("a", 0, 100))
    offer(made, frame("b", 0, 100))
    assert tokens(step(made)[0]) == {"a": 8, "b": 2}
    offer(made, frame("c", 0, 1, deadline_ns=2))
    made._held_back = True  # as if the batch before had been of one-token rows
    batch, _ = step(made)
    assert tokens(batch) == {"c": 1, "a": 1, "b": 8}
    assert batch is not None
    assert [row.num_tokens for row in batch.rows] == [1, 1, 8]  # decode rows first
    assert tokens(step(made)[0]) == {"a": 8, "b": 2}  # who had less is fed first
    assert tokens(step(made)[0]) == {"a": 2, "b": 8}


def test_a_rest_smaller_than_a_chunk_goes_round() -> None:
    made = scheduler("a", "b", chunk=8, max_chunk=8, step_tokens=6)
    offer(made, frame("a", 0, 100))
    offer(made, frame("b", 0, 100))
    found = [tokens(step(made)[0]) for _ in range(4)]
    assert found == [{"a": 5, "b": 1}, {"b": 5, "a": 1}] * 2


def test_who_was_passed_over_goes_before_deadlines() -> None:
    made = scheduler("a", "b", step_tokens=1, chunk=1, max_chunk=1)
    offer(made, frame("b", 0, 3))
    offer(made, frame("a", 0, 20, deadline_ns=5))
    found = [next(iter(tokens(step(made)[0]))) for _ in range(9)]
    assert "".join(found) == "aabaabaab"  # n = 2 batches may pass over it


def test_one_token_rows_go_alone_every_second_step() -> None:
    made = scheduler("a", "b", "c", chunk=4, max_chunk=4)
    offer(made, frame("a", 0, 100))
    found = []
    for sequence in range(4):
        offer(made, frame("b", sequence))
        offer(made, frame("c", sequence))
        found.append(tokens(step(made)[0]))
    assert found == [{"b": 1, "c": 1}, {"b": 1, "c": 1, "a": 4}] * 2


def test_one_token_rows_do_not_go_before_an_earlier_deadline() -> None:
    made = scheduler("a", "b")
    offer(made, frame("a", 0, 2, deadline_ns=10))
    offer(made, frame("b", 0, deadline_ns=20))
    assert tokens(step(made)[0]) == {"a": 2, "b": 1}
    offer(made, frame("a", 2, 2, deadline_ns=30))
    offer(made, frame("b", 1, deadline_ns=30))
    assert tokens(step(made)[0]) == {"b": 1}


def test_earliest_deadline_first() -> None:
    made = scheduler("a", "b", "c", "d", step_tokens=1, chunk=1, max_chunk=1)
    for stream, deadline in (("a", None), ("b", 30), ("c", 10), ("d", 20)):
        offer(made, frame(stream, 0, deadline_ns=deadline))
    assert [d.frame.stream for d in run(made)] == ["c", "d", "b", "a"]


def test_the_rest_is_dealt_by_deadline() -> None:
    made = scheduler("a", "b", "c", step_tokens=8, chunk=6, max_chunk=6)
    for stream, deadline in (("a", None), ("b", 30), ("c", 10)):
        offer(made, frame(stream, 0, 50, deadline_ns=deadline))
    for _ in range(3):
        assert tokens(step(made)[0]) == {"a": 1, "b": 1, "c": 6}


def test_without_deadlines_the_least_recently_served_is_first() -> None:
    made = scheduler("a", "b", "c", step_tokens=1, chunk=1, max_chunk=1)
    for stream in "abc":
        offer(made, frame(stream, 0, 3))
    served = [batch.rows[0].stream for _ in range(9) if (batch := step(made)[0]) is not None]
    assert served == list("abcabcabc")


def tokens_waiting(made: Scheduler, stream: str) -> int:
    items = made._lines[stream].queue
    return sum(item.num_events - item.taken for item in items if isinstance(item, Pending))


@settings(max_examples=150, deadline=None)
@given(
    lanes=st.integers(1, 9),
    step_tokens=st.integers(1, 10),
    chunk=st.integers(1, 5),
    overflow=st.sampled_from(["drop_oldest", "conflate"]),
    eager=st.sets(st.integers(0, 8)),
    data=st.data(),
)
def test_who_waits_is_served_within_the_stated_bound(lanes, step_tokens, chunk, overflow, eager, data) -> None:
    """Eager streams offer before every step, always with an earlier deadline than anyone's before; others at random."""
    made = Scheduler(lanes, Policy(16, overflow, chunk=chunk, max_chunk=5, step_tokens=step_tokens))
    names = [f"s{i}" for i in range(lanes)]
    for name in names:
        made.open(name)
    bound = 2 if lanes <= step_tokens else 3 * -(-lanes // step_tokens)
    sequence: Counter[str] = Counter()
    passed: dict[str, int] = {}  # waiting stream -> batches that passed it over
    for now in range(40):
        for i, name in enumerate(names):
            n = data.draw(st.sampled_from([1, 1, 4] if i in eager else [0, 0, 0, 1, 7]))
            if n:
                deadline = 10**6 - now if i in eager else data.draw(st.sampled_from([None, 10**7, 10**6 + now]))
                made.offer(frame(name, sequence[name], n, deadline_ns=deadline), now)
                sequence[name] += n
                passed.setdefault(name, 0)
        one_token = {name for name in names if tokens_waiting(made, name) == 1}
        batch = made.next_batch(now)
        if batch is None:
            assert not passed
            continue
        assert lanes > step_tokens or one_token <= {row.stream for row in batch.rows}
        assert 1 <= len(batch.rows) <= lanes
        assert sum(row.num_tokens for row in batch.rows) <= step_tokens
        made.commit(batch, now)
        served = {row.stream for row in batch.rows}
        for name in list(passed):
            passed[name] += 1
            assert passed[name] <= bound
            if name in served:
                del passed[name]
                if tokens_waiting(made, name):
                    passed[name] = 0
    made.check_integrity()


# --- any sequence of calls, against a plain twin ---------------------------------------------------------------------


@dataclass(eq=False)
class TwinItem:
    """A frame (its new sequence numbers) or a control (none)."""

    tag: int
    numbers: list[int]
    deadline: int = NEVER
    missing: int = 0
    taken: int = 0


@dataclass(eq=False)
class Twin:
    """One stream as lists."""

    lane: int
    queue: list[TwinItem] = field(default_factory=list)
    epoch: int | None = None
    expected: int = 0
    missing: int = 0

    def waiting(self) -> list[TwinItem]:
        return [item for item in self.queue if item.numbers and not item.taken]

    def remove(self, item: TwinItem) -> None:
        later = [other for other in self.queue[self.queue.index(item) + 1 :] if other.numbers]
        if later:
            later[0].missing += item.missing
        else:
            self.missing += item.missing
        self.queue.remove(item)

    def computable(self) -> list[tuple[int, int]]:
        """Return (tag, sequence number) of what can be computed before the next control."""
        found = []
        for item in self.queue:
            if not item.numbers:
                break
            found += [(item.tag, number) for number in item.numbers[item.taken :]]
        return found


STREAMS = ["a", "b", "c", "d"]
LANES = 3
PASS = st.sampled_from([0, 0, 1, 2, 6])  # of time
WHICH = st.integers(0, len(STREAMS) - 1)
OFFERS = st.tuples(
    st.sampled_from([0, 0, 0, 2, -1, -9]),  # ahead of the expectation
    st.sampled_from([1, 1, 1, 2, 5, 12]),  # events
    st.sampled_from([0, 0, 0, 0, 0, 1, -1]),  # epochs on
    st.sampled_from([None, None, None, 0, 2, 40]),  # own deadline, from now
)


class SchedulerTwin(RuleBasedStateMachine):
    """Drives a Scheduler and its twin; after every call all that can be observed must agree."""

    def __init__(self) -> None:
        super().__init__()
        self.made = Scheduler(LANES)
        self.twins: dict[str, Twin] = {}
        self.now = 1
        self.tags = 0
        self.batch: Batch | None = None
        self.held_back = False  # the batch before was of one-token rows alone, though others waited
        self.drops: list[tuple[int, str]] = []  # expected of take_dropped
        self.fate: dict[int, list[str]] = {}  # accepted tag -> what became of it
        self.accepted = self.answered = 0
        self.counts: Counter[str] = Counter()

    @initialize(
        overflow=st.sampled_from(["block", "drop_oldest", "conflate", "reject"]),
        on_deadline=st.sampled_from(["late", "expired"]),
        deadline_ns=st.sampled_from([None, 3, 10]),
        queue_events=st.integers(1, 8),
        chunk=st.integers(1, 4),
        step_tokens=st.integers(1, 9),
    )
    def configure(self, chunk: int, **policy: Any) -> None:
        self.policy = Policy(chunk=chunk, max_chunk=chunk, **policy)
        self.made = Scheduler(LANES, self.policy)
        for stream in STREAMS[:2]:
            self.open(stream)

    def tag(self) -> int:
        self.tags += 1
        return self.tags

    @rule(
        stream=st.sampled_from(STREAMS),
        what=st.sampled_from(["open", "open", "nothing", "nothing", "nothing", "closed", "failed"]),
    )
    def streams_come_and_go(self, stream: str, what: str) -> None:
        if what == "open":
            self.open(stream)
        elif what != "nothing":
            self.end(stream, what)

    def open(self, stream: str) -> None:
        if stream in self.twins:
            with pytest.raises(ConfigError):
                self.made.open(stream)
        elif len(self.twins) == LANES:
            with pytest.raises(OverloadError):
                self.made.open(stream)
        else:
            free = set(range(LANES)) - {twin.lane for twin in self.twins.values()}
            lane = self.made.open(stream)
            assert lane == min(free)
            self.twins[stream] = Twin(lane)

    def end(self, stream: str, reason: str) -> None:
        call = self.made.close if reason == "closed" else self.made.fail
        if stream not in self.twins:
            with pytest.raises(EngineError, match="not open"):
                call(stream, self.now)
            return
        twin = self.twins.pop(stream)
        assert call(stream, self.now) == twin.lane
        for item in twin.queue:
            self.drop(item, reason)

    def drop(self, item: TwinItem, reason: str) -> None:
        self.drops.append((item.tag, reason))
        self.fate[item.tag].append(reason)
        if item.numbers:
            self.counts[f"dropped {reason}"] += len(item.numbers)

    def pick(self, which: int) -> str:
        """Return the name of an open stream."""
        if not self.twins:
            self.open(STREAMS[which])
        return sorted(self.twins)[which % len(self.twins)]

    @rule(offers=st.lists(st.tuples(WHICH, OFFERS), min_size=1, max_size=6))
    def offer_frames(self, offers: list[tuple[int, tuple[int, int, int, int | None]]]) -> None:
        for which, offered in offers:
            self.offer_frame(self.pick(which), *offered)

    def offer_frame(self, stream: str, jump: int, n: int, epoch: int, deadline: int | None) -> None:
        twin = self.twins[stream]
        tag = self.tag()
        epoch = max(0, (twin.epoch or 0) + epoch)
        sequence = max(0, twin.expected + jump)
        own = None if deadline is None else self.now + deadline
        item = frame(stream, sequence, n, epoch=epoch, arrival_ns=self.now, deadline_ns=own)
        expected = self.predict(twin, epoch, list(range(sequence, sequence + n)), own, tag)
        if expected is None:
            with pytest.raises(OverloadError):
                self.made.offer(item, self.now, tag)
        else:
            assert self.made.offer(item, self.now, tag) is expected

    def predict(self, twin: Twin, epoch: int, numbers: list[int], own: int | None, tag: int) -> Admission | None:
        """Do to the twin what an offer should do; None: it raises."""
        if twin.epoch is not None and epoch < twin.epoch:
            return self.refuse(tag, "stale_epoch", len(numbers))
        same = epoch == twin.epoch
        new = [number for number in numbers if not same or number >= twin.expected]
        if not new:
            return self.refuse(tag, "duplicate", len(numbers))
        deadline = own
        if deadline is None:
            deadline = NEVER if self.policy.deadline_ns is None else self.now + self.policy.deadline_ns
        expired = self.policy.on_deadline == "expired" and deadline <= self.now
        waiting = twin.waiting()
        full = bool(waiting) and sum(len(i.numbers) for i in waiting) + len(new) > self.policy.queue_events
        if full and not expired and self.policy.overflow == "block":
            self.counts["blocked"] += 1
            return BLOCKED
        if full and not expired and self.policy.overflow == "reject":
            self.counts["refused rejected"] += len(new)
            return None
        if same:
            left_out = len(range(twin.expected, new[0]))
            twin.missing += left_out
            self.counts["missing"] += left_out
            self.counts["gaps"] += bool(left_out)
            self.counts["refused duplicate"] += len(numbers) - len(new)
        self.counts["epochs"] += not same and twin.epoch is not None
        twin.epoch, twin.expected = epoch, numbers[-1] + 1
        if expired:
            return self.refuse(tag, "expired", len(new))
        if self.policy.overflow == "conflate":
            for item in waiting:
                self.drop(item, "conflate")
                twin.remove(item)
        while self.policy.overflow == "drop_oldest" and (waiting := twin.waiting()):
            if sum(len(item.numbers) for item in waiting) + len(new) <= self.policy.queue_events:
                break
            self.drop(waiting[0], "drop_oldest")
            twin.remove(waiting[0])
        twin.queue.append(TwinItem(tag, new, deadline, twin.missing))
        twin.missing = 0
        self.fate[tag] = []
        self.accepted += len(new)
        return ACCEPTED

    def refuse(self, tag: int, reason: str, n: int) -> Admission:
        self.drops.append((tag, reason))
        self.counts[f"refused {reason}"] += n
        return DROPPED

    @rule(which=WHICH)
    def offer_control(self, which: int) -> None:
        stream, tag = self.pick(which), self.tag()
        assert self.made.offer(Control(stream, 0, "mark"), self.now, tag) is ACCEPTED
        self.twins[stream].queue.append(TwinItem(tag, []))
        self.fate[tag] = []

    @rule(which=WHICH, ahead=st.integers(-2, 3), epoch=st.sampled_from([0, 0, 0, 1, -1]))
    def heartbeat(self, which: int, ahead: int, epoch: int) -> None:
        stream = self.pick(which)
        twin = self.twins[stream]
        number = max(0, twin.expected + ahead)
        self.made.offer(Heartbeat(stream, max(0, (twin.epoch or 0) + epoch), number, 0), self.now)
        if twin.epoch == max(0, (twin.epoch or 0) + epoch) and number > twin.expected:
            self.counts["gaps"] += 1
            self.counts["missing"] += number - twin.expected
            twin.missing += number - twin.expected
            twin.expected = number

    @rule(ends=st.lists(st.tuples(st.sampled_from(["commit"] * 3 + ["abandon"]), PASS), min_size=1, max_size=6))
    def steps(self, ends: list[tuple[str, int]]) -> None:
        """Finish the batch in flight, run some whole steps, and leave one more in flight, or not."""
        for end, by in ends:
            if self.batch is not None:
                self.commit() if end == "commit" else self.abandon()
            self.now += by
            self.next_batch()
        if self.batch is not None and len(ends) % 2:
            self.commit()

    def next_batch(self) -> None:
        if self.policy.on_deadline == "expired":
            for twin in self.twins.values():
                for item in twin.waiting():
                    if item.deadline <= self.now:
                        self.drop(item, "expired")
                        twin.remove(item)
        batch = self.batch = self.made.next_batch(self.now)
        heads = {stream: twin.queue[0] for stream, twin in self.twins.items() if twin.queue}
        assert (batch is None) == (not heads)
        if batch is None:
            return
        assert batch.start_ns == self.now
        controls = {stream: item.tag for stream, item in heads.items() if not item.numbers}
        assert {item.control.stream: item.tag for item in batch.controls} == controls
        for stream, tag in controls.items():
            self.twins[stream].queue.pop(0)
            self.fate[tag].append("handed out")
        waiting = {stream for stream in heads if stream not in controls}
        rows = {row.stream: row for row in batch.rows}
        assert len(rows) == len(batch.rows)
        assert set(rows) <= waiting
        self.check_who_is_in(set(rows), waiting)
        total = sum(row.num_tokens for row in batch.rows)
        assert total <= self.policy.step_tokens
        for row in batch.rows:
            could = self.twins[row.stream].computable()
            assert row.lane == self.twins[row.stream].lane
            assert _events(row) == could[: row.num_tokens]
            most = min(len(could), self.policy.chunk)
            assert row.num_tokens == most or (row.num_tokens < most and total == self.policy.step_tokens)
            self.take(row, +1)

    def check_who_is_in(self, rows: set[str], waiting: set[str]) -> None:
        short = {stream for stream in waiting if len(self.twins[stream].computable()) == 1}
        if len(waiting) > self.policy.step_tokens:  # which of them come depends on who was served when
            held_back = len(rows) < self.policy.step_tokens
            assert not held_back or rows <= short
        else:
            held_back = False
            if short and short != waiting and not self.held_back:
                due = [min(self.twins[s].queue[0].deadline for s in some) for some in (short, waiting - short)]
                held_back = due[0] <= due[1]
            assert rows == (short if held_back else waiting)
        assert rows or not waiting
        assert not (held_back and self.held_back)
        self.held_back = held_back if rows else self.held_back

    def take(self, row: Row, sign: int) -> None:
        items = {item.tag: item for item in self.twins[row.stream].queue}
        for tag, _ in _events(row):
            items[tag].taken += sign

    def alive(self, row: Row) -> bool:
        """Return whether the row's stream is still the one that the batch was formed with."""
        twin = self.twins.get(row.stream)
        return twin is not None and any(item.tag == row.pieces[0].entry.tag for item in twin.queue)

    def commit(self) -> None:
        assert self.batch is not None
        expected = []
        for row in filter(self.alive, self.batch.rows):
            twin = self.twins[row.stream]
            while twin.queue and twin.queue[0].numbers and twin.queue[0].taken == len(twin.queue[0].numbers):
                item = twin.queue.pop(0)
                late = self.now > item.deadline
                self.counts["late"] += late
                self.answered += len(item.numbers)
                self.fate[item.tag].append("answered")
                expected.append((item.tag, twin.lane, item.missing, late, item.numbers))
        done = self.made.commit(self.batch, self.now)
        found = [
            (d.tag, d.lane, d.missing, d.late, list(range(d.frame.sequence, d.frame.sequence + len(d.frame))))
            for d in done
        ]
        assert found == expected
        assert all(d.frame.ids is not None and d.frame.ids[0] == d.frame.sequence for d in done)
        assert {(d.start_ns, d.end_ns) for d in done} <= {(self.batch.start_ns, self.now)}
        self.batch = None

    def abandon(self) -> None:
        assert self.batch is not None
        self.made.abandon(self.batch)
        for row in filter(self.alive, self.batch.rows):
            self.take(row, -1)
        self.batch = None

    @invariant()
    def books_agree(self) -> None:
        self.made.check_integrity()
        drops = [(drop.tag, drop.reason) for drop in self.made.take_dropped()]
        assert sorted(drops) == sorted(self.drops)  # type: ignore[type-var]
        self.drops = []
        counters = self.made.counters
        assert counters.accepted.events == self.accepted
        assert counters.answered.events == self.answered
        left = sum(len(item.numbers) for twin in self.twins.values() for item in twin.queue)
        controls = sum(not item.numbers for twin in self.twins.values() for item in twin.queue)
        assert counters.in_flight.events == left
        assert self.made.pending() == left + controls
        found = Counter(
            {
                "gaps": counters.gaps,
                "missing": counters.missing_events,
                "epochs": counters.epochs,
                "late": counters.late,
                "blocked": counters.blocked,
                **{f"dropped {reason}": tally.events for reason, tally in counters.dropped.items()},
                **{f"refused {reason}": tally.events for reason, tally in counters.refused.items()},
            }
        )
        assert found == self.counts

    def teardown(self) -> None:
        """Work everything off: every accepted item has had exactly one fate."""
        if not self.tags:
            return
        if self.batch is not None:
            self.commit()
        while self.made.next_batch(self.now) is not None:
            assert self.made._batch is not None
            done = self.made.commit(self.made._batch, self.now)
            for item in done:
                self.fate[item.tag].append("answered")  # type: ignore[index]
        assert self.made.counters.in_flight == Tally()
        left = {drop.tag for drop in self.made.take_dropped()}
        for twin in self.twins.values():
            for item in twin.queue:
                if not item.numbers:
                    self.fate[item.tag].append("handed out")
        assert [tag for tag, fates in self.fate.items() if len(fates) + (tag in left) != 1] == []
        for stream in list(self.twins):
            self.made.close(stream, self.now)
        assert [self.made.open(f"new {i}") for i in range(LANES)] == list(range(LANES))
        self.made.check_integrity()


def _events(row: Row) -> list[tuple[Any, int]]:
    """Return (tag, sequence number) of a row's tokens, and hold its pieces against its length."""
    events = [(p.entry.tag, p.entry.frame.sequence + i) for p in row.pieces for i in range(p.start, p.stop)]
    assert len(events) == row.num_tokens >= 1
    return events


def test_any_sequence_of_calls_agrees_with_the_twin() -> None:
    run_state_machine_as_test(
        SchedulerTwin,
        settings=settings(
            max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )


# --- imports ---------------------------------------------------------------------------------------------------------


def test_scheduler_and_metrics_do_not_import_torch() -> None:
    check = "import streamattn.scheduler, streamattn.metrics, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
