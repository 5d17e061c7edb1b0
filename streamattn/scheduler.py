"""Scheduler: which streams hold which lanes, what waits in their queues, and what the next batch computes.

    offer(item) -> queue of its stream -> next_batch() -> the engine computes -> commit() -> Done

One thread calls it, and time is an argument: the same calls give the same batches. A frame that was accepted leaves in
exactly one way, as Done or as Dropped with a reason; `check_integrity` holds the books against the queues.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from streamattn.batch import (
    NEVER,
    Admission,
    Batch,
    ControlItem,
    Counters,
    Done,
    Dropped,
    DropReason,
    Pending,
    Piece,
    Policy,
    RefusalReason,
    Row,
    Tally,
    check_count,
)
from streamattn.errors import ConfigError, EngineError, FrameError, OverloadError
from streamattn.frame import Control, Frame, Heartbeat

MAX_WAITING_CONTROLS = 1024  # of one stream: they cost no events, but they are bounded too
COMPANY_BATCHES = 256  # after the last batch that served another stream, a stream counts as alone


@dataclass(slots=True, eq=False)
class _Line:
    """One open stream: its queue, what is known of its numbering, and when it was served.

    The queue holds frames until they are finished, so its frames are: started ones, then waiting ones.
    """

    stream: str
    lane: int
    served: int  # batch that last gave it a token; for an idle one, at the earliest the one before it was opened
    since: int = 0  # batch after which its oldest item began to wait
    fed: int = 0  # batch that last dealt it all it could have of the rest, or dealt to it first
    queue: deque[Pending | ControlItem] = field(default_factory=deque)
    waiting: int = 0  # events of frames not started
    controls: int = 0
    epoch: int = -1  # -1: no frame yet
    expected: int = 0
    missing: int = 0  # events found missing and not yet attached to a frame
    # For expiry. While deadlines in the queue ascend, only its front has to be looked at.
    ascending: bool = True
    latest: int = 0
    earliest: int = NEVER  # no waiting frame has an earlier deadline


class Scheduler:
    """Owns lanes and queues and forms batches. Used from one thread; `now_ns` is monotonic.

    Fairness. In each batch every stream that waits gets one token before any gets a second, in the order: earliest
    deadline of the oldest unfinished frame, then least recently served. But where some want one token and others more,
    the first batch is of the former alone, unless a longer row is due earlier; the batch after it is for all. With
    `lanes <= step_tokens` a stream that waits for one token is therefore in the very next batch, any other in one of
    the next two. With more lanes let n = ceil(lanes / step_tokens): a stream that n batches in a row have passed over
    goes before all deadlines, longest unserved first, and at most lanes - 1 others, each once, can be before it. At
    least every second batch is for all, so it gets a token within 3 n batches, whatever the others do. A control at the
    head of a queue is handed out in the next batch.

    Numbering. Sequence numbers are judged when a frame is offered, so a rollback does not rewind them. A BLOCKED or
    rejected offer moves nothing: the same frame can be offered again, and if it never is, it shows as a gap. Frames
    dropped after they were accepted, or because they had expired on arrival, make no gap: they are drops with a reason.
    What was missing before a dropped frame is reported with the next frame that stays. Frames that come after their
    successors count as duplicates. A control's epoch is not judged.

    Args:
        lanes: streams open at once.
        policy: see Policy.

    Raises:
        ConfigError: `lanes` is not a positive integer.
    """

    def __init__(self, lanes: int, policy: Policy | None = None) -> None:
        check_count("lanes", lanes)
        self.lanes = lanes
        self.policy = policy or Policy()
        self.counters = Counters()
        self._free = list(range(lanes))  # a heap: low lanes first, so that batches stay dense
        self._lines: dict[str, _Line] = {}
        self._ready: dict[int, _Line] = {}  # lane -> line with a queue that is not empty
        self._dropped: list[Dropped] = []
        self._batch: Batch | None = None  # the one in flight
        self._step = 0
        self._patience = -(-lanes // self.policy.step_tokens)
        self._expires = self.policy.on_deadline == "expired"
        self._last_lane: int | None = None
        self._company = -COMPANY_BATCHES - 1  # the last batch that served several lanes, or another than the one before
        self._held_back = False  # the last batch left out rows of more than one token

    # --- streams ---

    def open(self, stream: str) -> int:
        """Return the lane reserved for a new stream.

        Raises:
            ConfigError: the stream is open already.
            OverloadError: no lane is free.
        """
        if stream in self._lines:
            raise ConfigError(f"stream {stream!r}: expected a new stream, found it open already")
        if not self._free:
            raise OverloadError(f"no free lane: all {self.lanes} lanes are in use; close a stream or raise lanes")
        lane = heapq.heappop(self._free)
        self._lines[stream] = _Line(stream, lane, served=self._step)
        return lane

    def close(self, stream: str, now_ns: int) -> int:
        """Free a stream's lane and return it. All that was not finished is dropped with the reason "closed".

        Raises:
            EngineError: the stream is not open.
        """
        return self._end(stream, "closed", now_ns)

    def fail(self, stream: str, now_ns: int) -> int:
        """Do as `close`, with the reason "failed"."""
        return self._end(stream, "failed", now_ns)

    def _end(self, stream: str, reason: Literal["closed", "failed"], now_ns: int) -> int:
        line = self._line(stream)
        for item in line.queue:
            if isinstance(item, Pending):
                item.dropped = True
                self._drop(item, reason, now_ns)
            else:
                self.counters.controls_dropped += 1
                self._dropped.append(Dropped(item.control, item.tag, reason, now_ns))
        self._ready.pop(line.lane, None)
        del self._lines[stream]
        heapq.heappush(self._free, line.lane)
        return line.lane

    def _line(self, stream: str) -> _Line:
        line = self._lines.get(stream)
        if line is None:
            raise EngineError(f"stream {stream!r}: not open")
        return line

    # --- in ---

    def offer(self, item: Frame | Control | Heartbeat, now_ns: int, tag: object = None) -> Admission:
        """Queue a frame or control behind what its stream has waiting, or take note of a heartbeat.

        Args:
            item: a frame with `arrival_ns == 0` counts as arrived at `now_ns`.
            now_ns: monotonic time.
            tag: comes back with the Done, Dropped or ControlItem.

        Returns:
            ACCEPTED, also for every heartbeat; BLOCKED; or DROPPED.

        Raises:
            EngineError: the stream is not open.
            FrameError: the frame has no events.
            OverloadError: the queue is full under the policy "reject", or, under another policy than "block", too many
                controls wait. The item is not in `take_dropped`.
        """
        line = self._line(item.stream)
        if isinstance(item, Frame):
            return self._offer_frame(line, item, now_ns, tag)
        if isinstance(item, Control):
            return self._offer_control(line, item, tag)
        self._note_heartbeat(line, item)
        return Admission.ACCEPTED

    def _offer_frame(self, line: _Line, frame: Frame, now_ns: int, tag: object) -> Admission:
        counters = self.counters
        n = len(frame)
        if n == 0:
            raise FrameError(f"frame: expected at least one event, found none, in stream {line.stream!r}")
        ahead = frame.sequence - line.expected if frame.epoch == line.epoch else 0  # > 0: missing, < 0: seen before
        if frame.epoch < line.epoch:
            return self._refuse(frame, n, tag, "stale_epoch", now_ns)
        if ahead + n <= 0:
            return self._refuse(frame, n, tag, "duplicate", now_ns)
        deadline = self._deadline(frame, now_ns)
        if self._expires and deadline <= now_ns:
            self._advance(line, frame, n, ahead)
            return self._refuse(frame, n + min(ahead, 0), tag, "expired", now_ns)
        if not self._make_room(line, n + min(ahead, 0), now_ns):
            counters.blocked += 1
            return Admission.BLOCKED
        self._advance(line, frame, n, ahead)
        if ahead < 0:
            frame = _without_head(frame, -ahead)
            n += ahead
        if not line.waiting:
            line.ascending, line.latest, line.earliest = True, deadline, deadline
        elif deadline < line.latest:
            line.ascending, line.earliest = False, min(deadline, line.earliest)
        else:
            line.latest = deadline
        line.queue.append(Pending(frame, tag, n, deadline, line.missing))
        line.waiting += n
        line.missing = 0
        self._wake(line)
        counters.accepted.frames += 1
        counters.accepted.events += n
        return Admission.ACCEPTED

    def _offer_control(self, line: _Line, control: Control, tag: object) -> Admission:
        if line.controls >= MAX_WAITING_CONTROLS:
            if self.policy.overflow == "block":
                self.counters.blocked += 1
                return Admission.BLOCKED
            self.counters.controls_rejected += 1
            raise OverloadError(
                f"stream {line.stream!r}: expected at most {MAX_WAITING_CONTROLS} waiting controls, found one more"
            )
        line.queue.append(ControlItem(control, line.lane, tag))
        line.controls += 1
        self._wake(line)
        self.counters.controls += 1
        return Admission.ACCEPTED

    def _note_heartbeat(self, line: _Line, heartbeat: Heartbeat) -> None:
        # Of another epoch, or before the first frame, it says nothing about what is missing here.
        if heartbeat.epoch == line.epoch and heartbeat.next_sequence > line.expected:
            self._note_gap(line, heartbeat.next_sequence - line.expected)
            line.expected = heartbeat.next_sequence

    def _deadline(self, frame: Frame, now_ns: int) -> int:
        if frame.deadline_ns is not None:
            return frame.deadline_ns
        budget = self.policy.deadline_ns
        return NEVER if budget is None else (frame.arrival_ns or now_ns) + budget

    def _advance(self, line: _Line, frame: Frame, n: int, ahead: int) -> None:
        """Move the expectation past a frame that was taken, and count what it tells about the ones before it."""
        if ahead > 0:
            self._note_gap(line, ahead)
        elif ahead < 0:
            self.counters.refused["duplicate"].events -= ahead
        if frame.epoch != line.epoch:
            self.counters.epochs += line.epoch >= 0
            line.epoch = frame.epoch
        line.expected = frame.sequence + n

    def _note_gap(self, line: _Line, missing: int) -> None:
        line.missing += missing
        self.counters.gaps += 1
        self.counters.missing_events += missing

    def _make_room(self, line: _Line, n: int, now_ns: int) -> bool:
        """Return whether `n` more events may wait, having dropped what the policy drops."""
        if not line.waiting:
            return True
        overflow, most = self.policy.overflow, self.policy.queue_events
        if overflow == "conflate":
            self._drop_waiting(line, lambda _: True, "conflate", now_ns)
            return True
        if line.waiting + n <= most:
            return True
        if overflow == "drop_oldest":
            self._drop_waiting(line, lambda _: line.waiting and line.waiting + n > most, "drop_oldest", now_ns)
            return True
        if overflow == "reject":
            self.counters.refused["rejected"].add(n)
            raise OverloadError(
                f"stream {line.stream!r}: expected room for {n} events, "
                f"found {line.waiting} of {most} waiting; offer slower or raise queue_events"
            )
        return False

    def _wake(self, line: _Line) -> None:
        if line.lane not in self._ready:
            self._ready[line.lane] = line
            line.since = self._step

    # --- drops ---

    def take_dropped(self) -> list[Dropped]:
        """Return what was dropped or refused since the last call. Call it after every step: the list is not bounded."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _refuse(self, frame: Frame, n: int, tag: object, reason: RefusalReason, now_ns: int) -> Admission:
        self.counters.refused[reason].add(n)
        self._dropped.append(Dropped(frame, tag, reason, now_ns))
        return Admission.DROPPED

    def _drop(self, entry: Pending, reason: DropReason, now_ns: int) -> None:
        self.counters.dropped[reason].add(entry.num_events)
        self._dropped.append(Dropped(entry.frame, entry.tag, reason, now_ns))

    def _drop_waiting(
        self,
        line: _Line,
        doomed: Callable[[Pending], Any],
        reason: DropReason,
        now_ns: int,
        everywhere: bool = False,
    ) -> None:
        """Drop doomed waiting frames up to the first that is not, or everywhere. The others keep their order."""
        kept: list[Pending | ControlItem] = []
        missing = 0
        while line.queue:
            item = line.queue.popleft()
            if isinstance(item, ControlItem) or item.taken:
                kept.append(item)
            elif doomed(item):
                line.waiting -= item.num_events
                missing += item.missing
                self._drop(item, reason, now_ns)
            else:
                item.missing += missing
                missing = 0
                kept.append(item)
                if not everywhere:
                    break
        line.missing += missing
        line.queue.extendleft(reversed(kept))

    def _expire(self, line: _Line, now_ns: int) -> None:
        if line.earliest > now_ns:
            return
        self._drop_waiting(line, lambda entry: entry.deadline_ns <= now_ns, "expired", now_ns, not line.ascending)
        left = (item.deadline_ns for item in line.queue if isinstance(item, Pending) and not item.taken)
        line.earliest = next(left, NEVER) if line.ascending else min(left, default=NEVER)
        if not line.queue:
            del self._ready[line.lane]

    # --- batches ---

    def next_batch(self, now_ns: int) -> Batch | None:
        """Return the next step's work, or None if nothing waits. It is in flight until `commit` or `abandon`.

        A stream with a control at the head of its queue contributes this control and no row. Frames that have expired
        are dropped first, if that is the policy.
        """
        assert self._batch is None, "a batch is in flight"
        if self._expires:
            for line in list(self._ready.values()):
                self._expire(line, now_ns)
        if not self._ready:
            return None
        self._step += 1
        alone = len(self._ready) == 1 and self._alone()
        controls, lines = self._split()
        self._batch = Batch(self._rows(lines, alone), controls, now_ns)
        return self._batch

    def commit(self, batch: Batch, now_ns: int) -> list[Done]:
        """Return the frames that the batch finished, those of a stream in order. `now_ns` is the end of the step."""
        assert batch is self._batch, "commit: expected the batch in flight"
        self._batch = None
        counters = self.counters
        done: list[Done] = []
        for row in batch.rows:
            if row.pieces[0].entry.dropped:
                continue  # the stream ended during the step
            queue = self._ready[row.lane].queue
            for piece in row.pieces:
                entry = piece.entry
                if piece.stop < entry.num_events:
                    break
                finished = queue.popleft()
                assert finished is entry
                late = now_ns > entry.deadline_ns
                counters.late += late
                counters.answered.frames += 1
                counters.answered.events += entry.num_events
                done.append(Done(entry.frame, entry.tag, row.lane, entry.missing, late, batch.start_ns, now_ns))
            if not queue:
                del self._ready[row.lane]
        return done

    def abandon(self, batch: Batch) -> None:
        """Take a batch back whose step failed: its tokens were not computed and will be handed out again.

        Its controls are not: they were handed over. Close or fail the streams to blame before the next batch.
        """
        assert batch is self._batch, "abandon: expected the batch in flight"
        self._batch = None
        for row in batch.rows:
            if row.pieces[0].entry.dropped:
                continue
            line = self._ready[row.lane]
            for piece in row.pieces:
                piece.entry.taken = piece.start
                if piece.start == 0:
                    line.waiting += piece.entry.num_events
                    line.earliest = min(line.earliest, piece.entry.deadline_ns)
                    line.ascending = False  # not known any more

    def _alone(self) -> bool:
        (lane,) = self._ready
        return self._last_lane in (None, lane) and self._step - self._company > COMPANY_BATCHES

    def _split(self) -> tuple[list[ControlItem], list[_Line]]:
        """Take the controls whose turn it is; return them, and the lines that have a token to compute."""
        controls: list[ControlItem] = []
        lines: list[_Line] = []
        for line in list(self._ready.values()):
            head = line.queue[0]
            if isinstance(head, Pending):
                lines.append(line)
                continue
            line.queue.popleft()
            line.controls -= 1
            line.since = self._step
            self.counters.controls_done += 1
            controls.append(head)
            if not line.queue:
                del self._ready[line.lane]
        return controls, lines

    def _rows(self, lines: list[_Line], alone: bool) -> list[Row]:
        if not lines:
            return []
        if len(lines) > 1:
            lines.sort(key=self._urgency)
            del lines[self.policy.step_tokens :]
        spare = self.policy.step_tokens - len(lines)  # everyone has a token; this is left to deal
        single = [line for line in lines if not _has_two(line)]
        longer = [line for line in lines if _has_two(line)]
        if self._one_token_rows_alone(single, longer):
            longer = []
        if len(longer) > 1:  # by deadline again, then whoever was cut short the last time
            longer.sort(key=lambda line: (_head_deadline(line), line.fed))
        limit = self.policy.max_chunk if alone else self.policy.chunk
        rows = [self._row(line, 1) for line in single]
        for turn, line in enumerate(longer):
            room = 1 + spare
            row = self._row(line, min(limit, room))
            spare -= row.num_tokens - 1
            if turn == 0 or room >= limit:
                line.fed = self._step
            rows.append(row)
        rows.sort(key=_is_long)
        if len(rows) > 1 or self._last_lane not in (None, rows[-1].lane):
            self._company = self._step
        self._last_lane = rows[-1].lane
        return rows

    def _one_token_rows_alone(self, single: list[_Line], longer: list[_Line]) -> bool:
        """Return whether longer rows wait for one step, so that whoever wants one token does not wait for a chunk.

        Never twice in a row, and never for later deadlines.
        """
        self._held_back = bool(single and longer) and not self._held_back
        if self._held_back:
            self._held_back = min(map(_head_deadline, longer)) >= min(map(_head_deadline, single))
        return self._held_back

    def _urgency(self, line: _Line) -> tuple[int, int]:
        passed_over = self._step - line.since > self._patience
        return (-1 if passed_over else _head_deadline(line), line.served)

    def _row(self, line: _Line, most: int) -> Row:
        pieces: list[Piece] = []
        left = most
        for item in line.queue:
            if isinstance(item, ControlItem):
                break
            start = item.taken
            if start == 0:
                line.waiting -= item.num_events
            item.taken = stop = min(item.num_events, start + left)
            pieces.append(Piece(item, start, stop))
            left -= stop - start
            if not left:
                break
        line.served = line.since = self._step
        return Row(line.lane, line.stream, pieces, most - left)

    # --- state ---

    def pending(self) -> int:
        """Return what is left to do: events in flight, plus waiting controls, plus drops not yet taken. 0: idle."""
        counters = self.counters
        controls = counters.controls - counters.controls_done - counters.controls_dropped
        return counters.in_flight.events + controls + len(self._dropped)

    def frames_in_progress(self) -> set[int]:
        """Return the `id()` of every accepted frame that is neither done nor dropped."""
        return {id(item.frame) for line in self._ready.values() for item in line.queue if isinstance(item, Pending)}

    def check_integrity(self) -> None:
        """Assert that lanes, queues and counters agree. Its cost is that of a walk over what waits."""
        used = sorted(line.lane for line in self._lines.values())
        assert sorted([*self._free, *used]) == list(range(self.lanes)), "a lane is lost or held twice"
        assert set(self._ready) == {line.lane for line in self._lines.values() if line.queue}
        in_batch = {id(p.entry) for row in self._batch.rows for p in row.pieces} if self._batch else set()
        found = Tally()
        for stream, line in self._lines.items():
            assert stream == line.stream
            frames = [item for item in line.queue if isinstance(item, Pending)]
            for entry in frames:
                found.add(entry.num_events)
                assert not entry.dropped
                assert len(entry.frame) == entry.num_events
                assert entry.taken < entry.num_events or id(entry) in in_batch
            started = [entry for entry in frames if entry.taken]
            assert frames[: len(started)] == started, "a later frame was started before an earlier one"
            assert sum(entry.num_events for entry in frames[len(started) :]) == line.waiting
            assert len(line.queue) - len(frames) == line.controls
            numbers = [(e.frame.epoch, e.frame.sequence, e.frame.sequence + e.num_events) for e in frames]
            assert all(a[0] < b[0] or a[2] <= b[1] for a, b in itertools.pairwise(numbers))
            assert not frames or numbers[-1][0] <= line.epoch
        counters = self.counters
        assert found == counters.in_flight, f"accepted, answered, dropped and in flight differ: {counters}"
        waiting = counters.controls - counters.controls_done - counters.controls_dropped
        assert sum(line.controls for line in self._lines.values()) == waiting


def _head_deadline(line: _Line) -> int:
    head = line.queue[0]
    assert isinstance(head, Pending)
    return head.deadline_ns


def _has_two(line: _Line) -> bool:
    """Return whether two tokens or more can be computed before the next control."""
    head = line.queue[0]
    assert isinstance(head, Pending)
    return head.num_events - head.taken > 1 or (len(line.queue) > 1 and isinstance(line.queue[1], Pending))


def _is_long(row: Row) -> bool:
    return row.num_tokens > 1


def _without_head(frame: Frame, seen: int) -> Frame:
    """Return the frame without its first `seen` events."""
    ids = None if frame.ids is None else frame.ids[seen:]
    features = None if frame.features is None else frame.features[seen:]
    sequence = frame.sequence + seen
    if frame.offsets_ns is None:  # its events have no times of their own
        return replace(frame, sequence=sequence, ids=ids, features=features)
    passed = int(frame.offsets_ns[seen])
    offsets = frame.offsets_ns[seen:] - passed
    event_ns = frame.event_ns + passed
    return replace(frame, sequence=sequence, event_ns=event_ns, ids=ids, features=features, offsets_ns=offsets)
