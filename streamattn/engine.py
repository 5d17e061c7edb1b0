"""Engine: streams in, answers out, one step at a time. It owns the device and is used from one thread.

One step: the scheduler forms a batch, the model runs it over the cache, the scheduler commits it, and every frame that
is now complete becomes a Result. `push` does all of that for one stream and returns its answer; `offer` and `step` are
the same in two halves, for many streams. `streamattn.async_engine` runs an Engine on its own thread for asyncio.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamattn.batch import Admission, Batch, ControlItem, Done, Piece, Policy, Row
from streamattn.context import Rows, StreamContext
from streamattn.errors import ConfigError, EngineError, FrameError, OverloadError, StreamattnError, StreamError
from streamattn.frame import GAP, LATE, Answer, Control, Fault, Frame, Heartbeat, Message, Reply, Result
from streamattn.model import Inputs, StreamTransformer
from streamattn.scheduler import Scheduler


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of one offered item: the messages that answer it, and the caller's `tag`.

    A dropped frame has a `reason` and no messages; a frame that asked for no answer has neither. `error` is set where
    a stream ended with a fault.
    """

    tag: object
    messages: tuple[Message, ...] = ()
    reason: str = ""
    error: StreamattnError | None = None


class Engine:
    """Runs one model over many streams.

    PyTorch's number of threads is the program's choice: `torch.set_num_threads(1)` is best for small models on a CPU,
    where more threads mostly wait for each other.

    Args:
        model: the weights; put into evaluation mode.
        lanes: streams held at once.
        marks: spare lanes for `mark`, shared by all streams.
        policy: queues, deadlines and chunk sizes.
        auto_open: whether a frame of an unknown stream opens it.
        clock: monotonic nanoseconds.

    Raises:
        ConfigError: impossible arguments.
    """

    def __init__(
        self,
        model: StreamTransformer,
        *,
        lanes: int = 8,
        marks: int = 0,
        policy: Policy | None = None,
        auto_open: bool = False,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.model = model.eval()
        self.cache = model.new_cache(lanes, marks)
        self.scheduler = Scheduler(lanes, policy or Policy())
        self.auto_open, self.clock = auto_open, clock
        self.streams: dict[str, Stream] = {}
        self._marks: dict[int, str] = {}  # spare row -> stream that holds it
        self._parts: dict[int, list[dict[str, np.ndarray]]] = {}  # id(frame) -> answers so far
        self._outbox: deque[Outcome] = deque()
        self.faults = 0

    # --- verbs ---

    def warmup(self) -> None:
        """Run the shapes that traffic will bring, so that no first event pays for it. Streams must not be open yet.

        Raises:
            EngineError: a stream is open.
        """
        if self.streams:
            raise EngineError("warmup: expected no open stream; call it before the first open")
        config = self.model.config
        policy = self.scheduler.policy
        lanes = list(range(self.cache.lanes))
        shapes = [
            Rows([0], [1]),
            Rows(lanes, [1] * len(lanes)),
            Rows([0], [policy.chunk]),
            Rows([0], [policy.max_chunk]),
        ]
        if len(lanes) > 1:
            shapes.append(Rows([0, 1], [1, policy.chunk]))
        for rows in shapes:
            n = sum(rows.lengths)
            ids = np.zeros(n, np.int32) if config.vocab else None
            features = np.zeros((n, config.features), np.float32) if config.features else None
            self._forward(rows, ids, features, None)
        for lane in lanes:
            self.cache.reset(lane)

    def open(self, stream: str) -> Stream:
        """Reserve a lane for a new stream.

        Raises:
            OverloadError: no lane is free.
            ConfigError: the stream is open already.
        """
        lane = self.scheduler.open(stream)
        self.cache.reset(lane)
        self.streams[stream] = handle = Stream(self, stream, lane)
        return handle

    def offer(self, item: Frame | Control | Heartbeat, tag: object = None) -> Admission:
        """Queue an item of a stream. Its Outcome comes from a later `step`.

        Returns:
            ACCEPTED, DROPPED (its Outcome says why), or BLOCKED: the queue is full; offer it again after a step.

        Raises:
            FrameError: the model cannot take these ids or features.
            OverloadError: no lane, or a full queue under the policy "reject".
            EngineError: the stream is not open.
        """
        if isinstance(item, Frame):
            self.check_input(item)
        asked = isinstance(item, Control) and item.op == "open"
        if item.stream not in self.streams and (asked or (self.auto_open and isinstance(item, Frame))):
            self.open(item.stream)
        return self.scheduler.offer(item, self.clock(), tag)

    def step(self) -> list[Outcome]:
        """Run one batch and return what was finished or dropped; empty if there is nothing to do."""
        batch = self.scheduler.next_batch(self.clock())
        if batch is not None:
            self._outbox.extend(self._run(batch))
        self._take_dropped()
        outcomes = list(self._outbox)
        self._outbox.clear()
        return outcomes

    def _take_dropped(self) -> None:
        reopened: set[str] = set()
        for drop in self.scheduler.take_dropped():
            item = drop.item
            if drop.reason == "closed" and isinstance(item, Control) and item.op == "open":
                reopened.add(item.stream)
            if item.stream in reopened and self._offered_again(item, drop.tag):
                continue
            self._outbox.append(Outcome(drop.tag, reason=drop.reason))

    def _offered_again(self, item: Frame | Control, tag: object) -> bool:
        """What came behind an `open` that waited behind a `close` belongs to the stream opened anew."""
        try:
            return self.offer(item, tag) is Admission.ACCEPTED
        except StreamattnError:
            return False

    def hand_back(self, outcomes: Sequence[Outcome]) -> None:
        """Put outcomes that belong to someone else before those of the next `step`."""
        self._outbox.extendleft(reversed(outcomes))

    @property
    def busy(self) -> bool:
        """Whether a `step` would have something to do."""
        return bool(self._outbox) or self.scheduler.pending() > 0

    @property
    def cache_bytes(self) -> int:
        """Bytes allocated for lanes and marks; constant for the engine's life."""
        return self.cache.allocated_bytes()

    # --- checks ---

    def check_input(self, frame: Frame) -> None:
        """Check that the model can take a frame's ids and features. It may be called from any thread.

        Raises:
            FrameError: with the code "bad_input".
        """
        config = self.model.config
        for name, size in (("ids", config.vocab), ("features", config.features)):
            if (getattr(frame, name) is None) == bool(size):
                wanted = "some" if size else "none"
                raise FrameError(f"{name}: expected {wanted} for this model, found otherwise", "bad_input")
        n = len(frame)
        if frame.ids is not None:
            if frame.ids.shape != (n,) or n == 0 or frame.ids.dtype.kind not in "iu":
                raise FrameError(
                    f"ids: expected integers of shape [n], found {frame.ids.dtype}{frame.ids.shape}", "bad_input"
                )
            if int(frame.ids.min()) < 0 or int(frame.ids.max()) >= config.vocab:
                raise FrameError(
                    f"ids: expected 0 to {config.vocab - 1}, found {frame.ids.min()} to {frame.ids.max()}", "bad_input"
                )
        if frame.features is not None:
            if frame.features.shape != (n, config.features) or n == 0:
                found = list(frame.features.shape)
                raise FrameError(f"features: expected shape [{n}, {config.features}], found {found}", "bad_input")
            if not np.isfinite(frame.features).all():
                raise FrameError("features: expected finite floats, found NaN or infinity", "bad_input")

    # --- one batch ---

    def _run(self, batch: Batch) -> list[Outcome]:
        outcomes = [self._control(item) for item in batch.controls]
        rows = sorted(batch.rows, key=lambda row: row.num_tokens > 1)  # one-token rows first
        rows = [row for row in rows if row.stream in self.streams]  # a control of this batch may have closed one
        if rows:
            try:
                heads, answered = self._compute(rows)
            except Exception as error:  # the streams of this batch are lost, the engine and all others are not
                self.scheduler.abandon(batch)
                return outcomes + [self._fail(row.stream, f"step failed: {error}", error) for row in rows]
            broken = self._collect(rows, heads, answered)
            outcomes += [self._fail(stream, "the model's answer is NaN or infinite", None) for stream in broken]
        return outcomes + [self._done(done) for done in self.scheduler.commit(batch, self.clock())]

    def _compute(self, rows: Sequence[Row]) -> tuple[dict[str, np.ndarray], list[list[np.ndarray]]]:
        pieces = [piece for row in rows for piece in row.pieces]
        ids = features = None
        if self.model.config.vocab:
            ids = _concatenate([p.entry.frame.ids for p in pieces], pieces)
        if self.model.config.features:
            features = _concatenate([p.entry.frame.features for p in pieces], pieces)
        answered, wanted, at = [], [], 0
        for row in rows:
            mine = []
            for piece in row.pieces:
                picked = _answered(piece.entry.frame, piece.start, piece.stop)
                mine.append(np.arange(len(wanted), len(wanted) + len(picked)))
                wanted.extend(at + index for index in picked)
                at += piece.stop - piece.start
            answered.append(mine)
        selected = None if len(wanted) == at else np.array(wanted, np.int64)
        shape = Rows([row.lane for row in rows], [row.num_tokens for row in rows])
        return self._forward(shape, ids, features, selected), answered

    @torch.inference_mode()
    def _forward(
        self, rows: Rows, ids: np.ndarray | None, features: np.ndarray | None, selected: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        device = self.model.device
        inputs = Inputs(
            None if ids is None else torch.from_numpy(ids.astype(np.int64)).to(device),
            None if features is None else torch.from_numpy(np.require(features, np.float32, ["C", "W"])).to(device),
        )
        context = StreamContext(self.cache, rows, self.model.config.scale)
        wanted = None if selected is None else torch.from_numpy(selected).to(device)
        heads = self.model(inputs, context, wanted)
        context.commit()
        return {name: _to_numpy(value) for name, value in heads.items()}

    def _collect(
        self, rows: Sequence[Row], heads: dict[str, np.ndarray], answered: list[list[np.ndarray]]
    ) -> list[str]:
        """File the answers under their frames; return the streams whose answers are not finite."""
        finite = [np.asarray(np.isfinite(value).all(axis=1)) for value in heads.values()]
        broken = []
        for row, picks in zip(rows, answered, strict=True):
            for piece, pick in zip(row.pieces, picks, strict=True):
                if not all(np.all(ok[pick]) for ok in finite):
                    broken.append(row.stream)
                    break
                part = {name: value[pick] for name, value in heads.items()}
                self._parts.setdefault(id(piece.entry.frame), []).append(part)
        return broken

    def _done(self, done: Done) -> Outcome:
        frame = done.frame
        parts = self._parts.pop(id(frame), [])
        if frame.answer == "none":
            return Outcome(done.tag)
        heads = parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        flags = (LATE if done.late else 0) | (GAP if done.missing else 0)
        result = Result(
            frame.stream,
            frame.epoch,
            frame.sequence,
            len(frame),
            frame.event_ns,
            frame.arrival_ns,
            done.start_ns,
            done.end_ns,
            heads,
            flags,
            done.missing,
        )
        return Outcome(done.tag, (result,))

    def _fail(self, stream: str, why: str, cause: BaseException | None) -> Outcome:
        """End one stream: its lane is freed, what it had queued is dropped, everyone else goes on."""
        self.faults += 1
        error = StreamError(stream, why)
        error.__cause__ = cause
        self.scheduler.fail(stream, self.clock())
        self._forget(stream)
        return Outcome(None, (Fault(stream, 0, "internal", why[:512]),), "failed", error)

    def _forget(self, stream: str) -> None:
        handle = self.streams.pop(stream)
        self.cache.reset(handle.lane)
        self._marks = {row: owner for row, owner in self._marks.items() if owner != stream}
        # What its unfinished frames had collected is dropped with them.
        waiting = self.scheduler.frames_in_progress()
        self._parts = {key: parts for key, parts in self._parts.items() if key in waiting}

    # --- control ---

    def _control(self, item: ControlItem) -> Outcome:
        control = item.control
        try:
            value = self._apply(control, item.lane)
        except StreamattnError as error:
            code = "overloaded" if isinstance(error, OverloadError) else "bad_input"
            return Outcome(item.tag, (Fault(control.stream, control.request, code, str(error)[:512]),), error=error)
        return Outcome(item.tag, (Reply(control.stream, control.epoch, control.request, value),))

    def _apply(self, control: Control, lane: int) -> int:
        match control.op:
            case "mark":
                free = next((row for row in range(self.cache.marks) if row not in self._marks), None)
                if free is None:
                    raise OverloadError(f"mark: expected a free one of {self.cache.marks} marks, found all in use")
                self.cache.mark(lane, free)
                self._marks[free] = control.stream
                return free
            case "rollback":
                if self._marks.get(control.value) != control.stream:
                    raise ConfigError(f"rollback: expected a mark of stream {control.stream!r}, found {control.value}")
                self.cache.rollback(lane, control.value)
            case "reset":
                self.cache.reset(lane)
            case "open":  # `offer` has opened it, or it was open before
                pass
            case "close":
                position = int(self.cache.position[lane])
                self.scheduler.close(control.stream, self.clock())
                self._forget(control.stream)
                return position
            case _:
                raise ConfigError(f"control: unknown operation {control.op!r}")
        return int(self.cache.position[lane])


@dataclass(eq=False, slots=True)
class Stream:
    """One open stream of an Engine, for programs that embed it. Sequence numbers are counted for you."""

    engine: Engine
    name: str
    lane: int
    sequence: int = 0
    _request: int = field(default=0)

    @property
    def position(self) -> int:
        """Tokens taken so far."""
        return int(self.engine.cache.position[self.lane])

    def push(
        self,
        ids: Any = None,
        features: Any = None,
        *,
        event_ns: int = 0,
        answer: Answer = "each",
        deadline_ns: int | None = None,
    ) -> Result:
        """Append events and return their answer.

        Args:
            ids: [n] integers, if the model takes ids.
            features: [n, d] floats, if the model takes features; one event may be given as [d].
            event_ns: producer's time of the first event.
            answer: "each" event's, or the "last" one's.
            deadline_ns: monotonic time after which the result is flagged late.

        Raises:
            FrameError: ids or features do not fit the model.
            StreamError: the stream has ended with a fault, or is closed.
        """
        frame = new_frame(self.name, self.sequence, ids, features, event_ns, answer, self.engine.clock(), deadline_ns)
        outcome = self._await(frame)
        self.sequence += len(frame)
        if outcome.reason:
            raise EngineError(f"stream {self.name!r}: the frame was dropped: {outcome.reason}")
        result = outcome.messages[0] if outcome.messages else None
        return result if isinstance(result, Result) else _silent(frame)

    def mark(self) -> int:
        """Remember the present state; return the mark's number for `rollback`.

        Raises:
            OverloadError: all marks are in use.
        """
        return self._command("mark")

    def rollback(self, mark: int) -> None:
        """Return to the state at `mark`. Exact for every part; sequence numbers go on. The mark stays."""
        self._command("rollback", mark)

    def reset(self) -> None:
        """Forget everything; sequence numbers go on."""
        self._command("reset")

    def close(self) -> None:
        """Free the lane and its marks. Frames still queued are dropped."""
        self._command("close")

    def _command(self, op: Any, value: int = 0) -> int:
        self._request += 1
        outcome = self._await(Control(self.name, 0, op, self._request, value))
        if outcome.error is not None:
            raise outcome.error
        if outcome.reason:
            raise StreamError(self.name, f"{op} was dropped: {outcome.reason}")
        reply = outcome.messages[0]
        assert isinstance(reply, Reply)
        return reply.value

    def _await(self, item: Frame | Control) -> Outcome:
        if self.engine.streams.get(self.name) is not self:
            raise StreamError(self.name, "is closed; open it again")
        tag = object()
        others: list[Outcome] = []
        try:
            while self.engine.offer(item, tag) is Admission.BLOCKED:
                others += self.engine.step()
            while True:
                outcomes = self.engine.step()
                mine = next((o for o in outcomes if o.tag is tag or self._ended(o)), None)
                others += [outcome for outcome in outcomes if outcome is not mine]
                if mine is None:
                    continue
                if self._ended(mine):
                    assert mine.error is not None
                    raise mine.error
                return mine
        finally:
            self.engine.hand_back([outcome for outcome in others if outcome.tag is not tag])

    def _ended(self, outcome: Outcome) -> bool:
        return isinstance(outcome.error, StreamError) and outcome.error.stream == self.name


def new_frame(
    stream: str,
    sequence: int,
    ids: Any,
    features: Any,
    event_ns: int,
    answer: Answer,
    arrival_ns: int,
    deadline_ns: int | None,
) -> Frame:
    """Return a Frame of array-likes: scalars and single events become columns of one."""
    columns = None if ids is None else np.atleast_1d(np.asarray(ids))
    floats = None if features is None else np.atleast_2d(np.asarray(features, np.float32))
    return Frame(stream, 0, sequence, event_ns, columns, floats, None, answer, arrival_ns, deadline_ns)


def _silent(frame: Frame) -> Result:
    return Result(frame.stream, frame.epoch, frame.sequence, len(frame), frame.event_ns, frame.arrival_ns, 0, 0)


def _answered(frame: Frame, start: int, stop: int) -> range | tuple[int, ...]:
    """Return which events of frame[start:stop] want an answer, relative to start."""
    if frame.answer == "each":
        return range(stop - start)
    if frame.answer == "last" and stop == len(frame):
        return (stop - start - 1,)
    return ()


def _concatenate(columns: list[np.ndarray | None], pieces: list[Piece]) -> np.ndarray:
    """Return the pieces' parts of their frames' columns, which `offer` has checked to be there."""
    parts = [column[p.start : p.stop] for column, p in zip(columns, pieces, strict=True) if column is not None]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _to_numpy(value: Tensor) -> np.ndarray:
    return value.to(torch.float32).cpu().numpy()
