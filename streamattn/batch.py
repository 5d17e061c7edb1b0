"""What the scheduler is told and what it tells: policy, counters, batches and their outcomes. Pure Python."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from streamattn.errors import ConfigError
from streamattn.frame import Control, Frame

Overflow = Literal["block", "drop_oldest", "conflate", "reject"]
OnDeadline = Literal["late", "expired"]
DropReason = Literal["drop_oldest", "conflate", "expired", "closed", "failed"]  # accepted before
RefusalReason = Literal["duplicate", "stale_epoch", "expired", "rejected"]  # never accepted

NEVER = 2**63 - 1  # ns: no deadline


@dataclass(frozen=True, slots=True)
class Policy:
    """How long queues may grow, what happens then, what a deadline means, and how steps are cut.

    Attributes:
        queue_events: most events waiting in one stream's queue. A longer frame is admitted into an empty queue. A frame
            of which a part is computed or being computed has left the queue.
        overflow: what an offer to a full queue does. "block": nothing, the caller keeps the frame. "reject": raises
            OverloadError. "drop_oldest": the longest waiting frames go. "conflate": all waiting frames go, at every
            offer, full or not: only the newest waits.
        deadline_ns: budget from arrival in nanoseconds; a frame's own `deadline_ns` wins. None: no deadline.
        on_deadline: "late": computed and flagged. "expired": dropped, if none of it has been computed.
        chunk: most tokens of one stream in a step while others wait for an answer, or had one a moment ago.
        max_chunk: the same while it is alone.
        step_tokens: most tokens in a step over all streams; it caps the two above.

    Raises:
        ConfigError: a value that cannot work.
    """

    queue_events: int = 4096
    overflow: Overflow = "block"
    deadline_ns: int | None = None
    on_deadline: OnDeadline = "late"
    chunk: int = 32
    max_chunk: int = 256
    step_tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("queue_events", "chunk", "max_chunk", "step_tokens"):
            check_count(name, getattr(self, name))
        if self.deadline_ns is not None:
            check_count("deadline_ns", self.deadline_ns)
        for name, kind in (("overflow", Overflow), ("on_deadline", OnDeadline)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name}: expected one of {get_args(kind)}, found {getattr(self, name)!r}")
        if self.chunk > self.max_chunk:
            raise ConfigError(f"chunk: expected at most max_chunk = {self.max_chunk}, found {self.chunk}")


def check_count(name: str, value: Any) -> None:
    """Raise ConfigError unless the value is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}: expected an integer >= 1, found {value!r}")


class Admission(enum.Enum):
    """What became of an offer."""

    ACCEPTED = "accepted"
    BLOCKED = "blocked"  # the queue is full: the caller keeps the item, offers it again, and meanwhile no later one
    DROPPED = "dropped"  # refused for good; `take_dropped` says why


# --- books -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """A number of frames and of the events in them."""

    frames: int = 0
    events: int = 0

    def add(self, events: int) -> None:
        """Count one more frame."""
        self.frames += 1
        self.events += events


@dataclass(slots=True)
class Counters:
    """What a scheduler has done. accepted = answered + dropped + in_flight, for frames and for events.

    A frame is counted whole: it is in flight until its last event is computed.

    Attributes:
        accepted: frames taken into a queue, without the events that were sliced off.
        answered: frames that became Done.
        dropped: accepted frames that were never answered, by reason.
        refused: frames that were never accepted, by reason. "duplicate" also counts the events, but not the frame,
            where the head of an accepted frame had been seen already.
        gaps, missing_events: places where sequence numbers were left out, and how many were.
        epochs: restarts of a producer that were followed.
        late: answered frames whose deadline had passed.
        blocked: offers answered with BLOCKED.
        controls: taken into a queue; of these, controls_done were handed out, controls_dropped ended with their stream.
        controls_rejected: refused.
    """

    accepted: Tally = field(default_factory=Tally)
    answered: Tally = field(default_factory=Tally)
    dropped: dict[DropReason, Tally] = field(default_factory=lambda: {r: Tally() for r in get_args(DropReason)})
    refused: dict[RefusalReason, Tally] = field(default_factory=lambda: {r: Tally() for r in get_args(RefusalReason)})
    gaps: int = 0
    missing_events: int = 0
    epochs: int = 0
    late: int = 0
    blocked: int = 0
    controls: int = 0
    controls_done: int = 0
    controls_dropped: int = 0
    controls_rejected: int = 0

    @property
    def in_flight(self) -> Tally:
        """Frames accepted and neither answered nor dropped."""
        dropped = self.dropped.values()
        return Tally(
            self.accepted.frames - self.answered.frames - sum(tally.frames for tally in dropped),
            self.accepted.events - self.answered.events - sum(tally.events for tally in dropped),
        )

    @property
    def duplicates(self) -> int:
        """Events that had been seen before."""
        return self.refused["duplicate"].events

    @property
    def rejected(self) -> int:
        """Frames refused under the policy "reject"."""
        return self.refused["rejected"].frames

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as nested dictionaries of ints."""

        def plain(value: Any) -> Any:
            if isinstance(value, Tally):
                return {"frames": value.frames, "events": value.events}
            return {name: plain(tally) for name, tally in value.items()} if isinstance(value, dict) else value

        numbers = {entry.name: plain(getattr(self, entry.name)) for entry in fields(self)}
        numbers["in_flight"] = plain(self.in_flight)
        return numbers


# --- what goes in and out --------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Pending:
    """An accepted frame on its way.

    Attributes:
        frame: as accepted: events seen before are sliced off.
        tag: the caller's.
        num_events: of the frame.
        deadline_ns: monotonic time; 2^63 - 1 if it has none.
        missing: events that never came right before it.
        taken: events handed out to batches so far. More than 0: the frame has been started.
        dropped: its stream ended while it was in a batch.
    """

    frame: Frame
    tag: object
    num_events: int
    deadline_ns: int
    missing: int
    taken: int = 0
    dropped: bool = False


@dataclass(slots=True, eq=False)
class ControlItem:
    """A control whose turn has come. It is handed out once, also if its batch is abandoned."""

    control: Control
    lane: int
    tag: object


@dataclass(slots=True, eq=False)
class Piece:
    """The events `start` to `stop` of a frame. It is finished if `stop == entry.num_events`."""

    entry: Pending
    start: int
    stop: int


@dataclass(slots=True, eq=False)
class Row:
    """Consecutive tokens of one stream in a batch: pieces of one or several frames, in order. One token: a decode."""

    lane: int
    stream: str
    pieces: list[Piece]
    num_tokens: int


@dataclass(slots=True, eq=False)
class Batch:
    """One step's work: at most one row or one control a stream; rows of one token first."""

    rows: list[Row]
    controls: list[ControlItem]
    start_ns: int


@dataclass(slots=True, eq=False)
class Done:
    """A frame whose last event was computed.

    `start_ns` and `end_ns` are those of the step that finished it; `missing` events never came right before it.
    """

    frame: Frame
    tag: object
    lane: int
    missing: int
    late: bool
    start_ns: int
    end_ns: int


@dataclass(slots=True, eq=False)
class Dropped:
    """A frame that will never be answered, or a control that ended with its stream (reason "closed" or "failed")."""

    item: Frame | Control
    tag: object
    reason: DropReason | RefusalReason
    time_ns: int
