"""Messages of a stream, their wire form, and the protocols that connectors implement.

One MessagePack array is one message; its first element names the kind, its second the version. `docs/wire.md` is
the specification for clients in other languages. Payload columns are packed little-endian, so a frame of many events
decodes at the cost of one. Decoding is typed throughout: hostile bytes cost bounded time and memory and end in one
`FrameError`. This module imports neither torch nor any transport.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, Self

import msgspec
import numpy as np
from msgspec import Meta

from streamattn.errors import FrameError

WIRE_VERSION = 1
MAX_MESSAGE_BYTES = 1 << 20  # of one encoded message; transports refuse larger ones before they reach the decoder
MAX_EVENTS = 65_536  # in one frame
MAX_FEATURES = 4_096  # floats of one event
MAX_HEADS = 32  # of one result

Answer = Literal["each", "last", "none"]
_ANSWERS: tuple[Answer, ...] = ("each", "last", "none")

LATE = 1  # Result.flags: the answer was finished after its deadline
GAP = 2  # Result.flags: events are missing right before this range; `missing` says how many


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One input message: consecutive events of one stream.

    Attributes:
        stream: name of the stream, at most 128 bytes of UTF-8.
        epoch: start number of the producer; a restarted producer uses a higher one and may count from 0 again.
        sequence: number of the first event. Event i has `sequence + i`.
        event_ns: producer's time of the first event, nanoseconds. Data only, never compared with our clocks.
        ids: [n] int32 token ids, or None for a model without symbols.
        features: [n, d] float32, or None for a model without features.
        offsets_ns: [n] int64 nanoseconds from `event_ns` to each event, or None.
        answer: which events get an answer: "each", "last" or "none" (context only).
        arrival_ns: our monotonic time of receipt; set by the source, not on the wire.
        deadline_ns: monotonic time after which the answer is useless; set by the engine's policy, not on the wire.
    """

    stream: str
    epoch: int
    sequence: int
    event_ns: int
    ids: np.ndarray | None = None
    features: np.ndarray | None = None
    offsets_ns: np.ndarray | None = None
    answer: Answer = "each"
    arrival_ns: int = 0
    deadline_ns: int | None = None

    def __len__(self) -> int:
        column = self.ids if self.ids is not None else self.features
        return 0 if column is None else len(column)


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """One output message: the answers to `num_events` consecutive events of one stream.

    Attributes:
        sequence, num_events: the input range that is answered.
        event_ns: copied from the frame.
        arrival_ns, start_ns, end_ns: our monotonic times of receipt, start of the (last) step, end of it.
        heads: name -> [rows, ...] array; `rows` is `num_events`, or 1 where the frame asked for "last".
        flags: LATE | GAP.
        missing: events that never came right before this range.
    """

    stream: str
    epoch: int
    sequence: int
    num_events: int
    event_ns: int
    arrival_ns: int
    start_ns: int
    end_ns: int
    heads: dict[str, np.ndarray] = field(default_factory=dict)
    flags: int = 0
    missing: int = 0

    @property
    def late(self) -> bool:
        """Whether the answer was finished after its deadline."""
        return bool(self.flags & LATE)


ControlOp = Literal["open", "close", "reset", "mark", "rollback"]


@dataclass(frozen=True, slots=True)
class Control:
    """An in-band command: it takes effect in order with the stream's frames.

    `request` comes back in the `Reply` or `Fault`; `value` is the mark's number for "rollback".
    """

    stream: str
    epoch: int
    op: ControlOp
    request: int = 0
    value: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a `Control`: `value` is the mark's number for "mark", else the stream's position."""

    stream: str
    epoch: int
    request: int
    value: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Says which sequence number the next event of a stream will have, so that the loss of the last ones shows."""

    stream: str
    epoch: int
    next_sequence: int
    time_ns: int


@dataclass(frozen=True, slots=True)
class Fault:
    """What went wrong, for whom. `code` is one of `docs/wire.md`'s error codes; `stream` is "" where none is to blame."""

    stream: str
    request: int
    code: str
    message: str


Message = Frame | Control | Heartbeat | Result | Reply | Fault

# --- wire ------------------------------------------------------------------------------------------------------------

_U64 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_I64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Stream = Annotated[str, Meta(min_length=1, max_length=128)]
_MaybeStream = Annotated[str, Meta(max_length=128)]
_Version = Literal[1]


class _Wire(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False, frozen=True):
    pass


class _FrameWire(_Wire, tag="e"):
    version: _Version
    stream: _Stream
    epoch: _U64
    sequence: _U64
    event_ns: _I64
    num_events: Annotated[int, Meta(ge=1, le=MAX_EVENTS)]
    ids: bytes | None
    num_features: Annotated[int, Meta(ge=0, le=MAX_FEATURES)]
    features: bytes | None
    offsets_ns: bytes | None
    answer: Annotated[int, Meta(ge=0, le=2)]


class _ArrayWire(_Wire):
    dtype: Literal["f4", "i4", "i8"]
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=2**31 - 1)]], Meta(min_length=1, max_length=4)]
    data: bytes


class _ResultWire(_Wire, tag="o"):
    version: _Version
    stream: _Stream
    epoch: _U64
    sequence: _U64
    num_events: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    event_ns: _I64
    arrival_ns: _I64
    start_ns: _I64
    end_ns: _I64
    flags: Annotated[int, Meta(ge=0, le=255)]
    missing: _U64
    heads: Annotated[dict[Annotated[str, Meta(max_length=64)], _ArrayWire], Meta(max_length=MAX_HEADS)]


class _ControlWire(_Wire, tag="c"):
    version: _Version
    stream: _Stream
    epoch: _U64
    op: ControlOp
    request: _U64
    value: _U64


class _ReplyWire(_Wire, tag="a"):
    version: _Version
    stream: _Stream
    epoch: _U64
    request: _U64
    value: _U64


class _HeartbeatWire(_Wire, tag="h"):
    version: _Version
    stream: _Stream
    epoch: _U64
    next_sequence: _U64
    time_ns: _I64


class _FaultWire(_Wire, tag="x"):
    version: _Version
    stream: _MaybeStream
    request: _U64
    code: Annotated[str, Meta(max_length=32)]
    message: Annotated[str, Meta(max_length=512)]


_AnyWire = _FrameWire | _ResultWire | _ControlWire | _ReplyWire | _HeartbeatWire | _FaultWire
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_AnyWire)
_DTYPES = {"f4": np.dtype("<f4"), "i4": np.dtype("<i4"), "i8": np.dtype("<i8")}


def encode(message: Message) -> bytes:
    """Return the wire form of a message.

    Raises:
        FrameError: a column has the wrong length or type, or a limit of the wire is exceeded.
    """
    data = _encoder.encode(_to_wire(message))
    if len(data) > MAX_MESSAGE_BYTES:
        raise FrameError(f"message: expected at most {MAX_MESSAGE_BYTES} bytes, found {len(data)}", "too_large")
    return data


def decode(data: bytes, *, arrival_ns: int = 0) -> Message:
    """Return the message in `data`. `arrival_ns` is stamped on frames.

    Raises:
        FrameError: anything else than one valid message of a known version.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise FrameError(f"message: expected at most {MAX_MESSAGE_BYTES} bytes, found {len(data)}", "too_large")
    try:
        wire = _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise FrameError(f"not a message: {str(error)[:200]}") from None
    if isinstance(wire, _FrameWire):
        return _frame_from_wire(wire, arrival_ns)
    if isinstance(wire, _ResultWire):
        return _result_from_wire(wire)
    if isinstance(wire, _ControlWire):
        return Control(wire.stream, wire.epoch, wire.op, wire.request, wire.value)
    if isinstance(wire, _HeartbeatWire):
        return Heartbeat(wire.stream, wire.epoch, wire.next_sequence, wire.time_ns)
    if isinstance(wire, _ReplyWire):
        return Reply(wire.stream, wire.epoch, wire.request, wire.value)
    return Fault(wire.stream, wire.request, wire.code, wire.message)


def _to_wire(message: Message) -> _Wire:
    match message:
        case Frame():
            return _frame_to_wire(message)
        case Result():
            return _result_to_wire(message)
        case Control(stream, epoch, op, request, value):
            return _ControlWire(WIRE_VERSION, _name(stream), epoch, op, request, value)
        case Heartbeat(stream, epoch, next_sequence, time_ns):
            return _HeartbeatWire(WIRE_VERSION, _name(stream), epoch, next_sequence, time_ns)
        case Reply(stream, epoch, request, value):
            return _ReplyWire(WIRE_VERSION, _name(stream), epoch, request, value)
        case Fault(stream, request, code, text):
            return _FaultWire(WIRE_VERSION, stream, request, code, text[:512])


def _name(stream: str) -> str:
    if not 1 <= len(stream) <= 128:
        raise FrameError(f"stream: expected a name of 1 to 128 characters, found {len(stream)}")
    return stream


def _frame_to_wire(frame: Frame) -> _FrameWire:
    n = len(frame)
    if not 1 <= n <= MAX_EVENTS:
        raise FrameError(f"frame: expected 1 to {MAX_EVENTS} events, found {n}")
    width = 0
    features = None
    if frame.features is not None:
        if frame.features.ndim != 2 or len(frame.features) != n:
            raise FrameError(f"features: expected shape [{n}, d], found {list(frame.features.shape)}")
        width = frame.features.shape[1]
        features = np.ascontiguousarray(frame.features, "<f4").tobytes()
    offsets = None
    if frame.offsets_ns is not None:
        if frame.offsets_ns.shape != (n,):
            raise FrameError(f"offsets_ns: expected shape [{n}], found {list(frame.offsets_ns.shape)}")
        offsets = np.ascontiguousarray(frame.offsets_ns, "<i8").tobytes()
    ids = None if frame.ids is None else np.ascontiguousarray(frame.ids, "<i4").tobytes()
    return _FrameWire(
        WIRE_VERSION,
        _name(frame.stream),
        frame.epoch,
        frame.sequence,
        frame.event_ns,
        n,
        ids,
        width,
        features,
        offsets,
        _ANSWERS.index(frame.answer),
    )


def _frame_from_wire(wire: _FrameWire, arrival_ns: int) -> Frame:
    n = wire.num_events
    ids = None if wire.ids is None else _column(wire.ids, "<i4", (n,), "ids")
    features = None
    if wire.features is not None:
        features = _column(wire.features, "<f4", (n, wire.num_features), "features")
        if not np.isfinite(features).all():
            raise FrameError("features: expected finite floats, found NaN or infinity")
    elif wire.num_features:
        raise FrameError(f"features: expected {wire.num_features} floats an event, found none")
    if ids is None and not wire.num_features:
        raise FrameError("frame: expected ids or features, found neither")
    offsets = None if wire.offsets_ns is None else _column(wire.offsets_ns, "<i8", (n,), "offsets_ns")
    return Frame(
        wire.stream,
        wire.epoch,
        wire.sequence,
        wire.event_ns,
        ids,
        features,
        offsets,
        _ANSWERS[wire.answer],
        arrival_ns,
    )


def _column(data: bytes, dtype: str, shape: tuple[int, ...], name: str) -> np.ndarray:
    expected = np.dtype(dtype).itemsize * math.prod(shape)
    if len(data) != expected:
        raise FrameError(f"{name}: expected {expected} bytes for shape {list(shape)}, found {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape)


def _result_to_wire(result: Result) -> _ResultWire:
    heads: dict[str, _ArrayWire] = {}
    for name, array in result.heads.items():
        kind = "f4" if array.dtype.kind == "f" else ("i8" if array.dtype.itemsize == 8 else "i4")
        heads[name] = _ArrayWire(kind, list(array.shape), np.ascontiguousarray(array, _DTYPES[kind]).tobytes())
    return _ResultWire(
        WIRE_VERSION,
        _name(result.stream),
        result.epoch,
        result.sequence,
        result.num_events,
        result.event_ns,
        result.arrival_ns,
        result.start_ns,
        result.end_ns,
        result.flags,
        result.missing,
        heads,
    )


def _result_from_wire(wire: _ResultWire) -> Result:
    heads = {
        name: _column(array.data, _DTYPES[array.dtype].str, tuple(array.shape), f"head {name!r}")
        for name, array in wire.heads.items()
    }
    return Result(
        wire.stream,
        wire.epoch,
        wire.sequence,
        wire.num_events,
        wire.event_ns,
        wire.arrival_ns,
        wire.start_ns,
        wire.end_ns,
        heads,
        wire.flags,
        wire.missing,
    )


# --- connectors ------------------------------------------------------------------------------------------------------


def _nothing() -> None:
    pass


@dataclass(slots=True, eq=False)
class Delivery:
    """A message handed out by a source, with its acknowledgement.

    `acknowledge()` tells the transport that the message is safe (answered, journaled, or dropped and counted). It is
    called once, from the event loop's thread, and never blocks.
    """

    message: Frame | Control | Heartbeat
    acknowledge: Callable[[], None] = _nothing


@dataclass(slots=True)
class ConnectorStats:
    """Counters of one connector. Only its own code adds to them."""

    messages: int = 0  # received or sent whole
    num_bytes: int = 0
    bad_messages: int = 0  # received, not decodable, dropped
    dropped: int = 0  # known to be lost on the way: a full queue without backpressure
    reconnects: int = 0


class Source(Protocol):
    """Yields what arrives on a transport. Used as `async with source: async for deliveries in source.frames()`.

    `frames()` yields, at each wake-up, a non-empty list of all that was ready (bounded by a budget), in order of
    arrival; it ends when the transport has ended for good or `close()` was called. Cancelling an iteration loses
    nothing: what was not yielded comes with the next `frames()`. A message that does not decode is counted in
    `stats.bad_messages`, acknowledged and skipped. Reading stops while the consumer does not ask for more: that is
    the backpressure.
    """

    name: str
    stats: ConnectorStats

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc: Any) -> None: ...
    def frames(self) -> AsyncIterator[Sequence[Delivery]]: ...
    async def close(self) -> None: ...


class Sink(Protocol):
    """Sends messages to a transport. `send` returns when the transport has taken the message.

    A transport with backpressure makes `send` wait; one without drops and counts it in `stats.dropped`.
    `close` gives what is queued a bounded time to leave.
    """

    name: str
    stats: ConnectorStats

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc: Any) -> None: ...
    async def send(self, message: Message) -> None: ...
    async def close(self) -> None: ...
