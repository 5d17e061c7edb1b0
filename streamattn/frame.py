"""Messages of a stream, their wire form, and the protocols that connectors implement.

One MessagePack array is one message; its first element names the kind, its second the version. `docs/wire.md` is
the specification for clients in other languages. Payload columns are packed little-endian, so a frame of many events
decodes at the cost of one. Decoding is typed throughout: hostile bytes cost bounded time and memory and end in one
`FrameError`. This module imports neither torch nor any transport.
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, Self, get_args

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
        stream: name of the stream: 1 to 128 characters, no control characters.
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
    """What went wrong. `code` is one of `docs/wire.md`'s error codes; `stream` is "" where no stream is to blame."""

    stream: str
    request: int
    code: str
    message: str


Message = Frame | Control | Heartbeat | Result | Reply | Fault

# --- wire ------------------------------------------------------------------------------------------------------------

_MAX_INT = 2**63 - 1
_Count = Annotated[int, Meta(ge=0, le=_MAX_INT)]
_Time = Annotated[int, Meta(ge=-(2**63), le=_MAX_INT)]
_Name = Annotated[str, Meta(min_length=1, max_length=128)]
_Dimension = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class _Wire(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    version: Literal[1]


class _FrameWire(_Wire, tag="e"):
    stream: _Name
    epoch: _Count
    sequence: _Count
    event_ns: _Time
    num_events: Annotated[int, Meta(ge=1, le=MAX_EVENTS)]
    ids: bytes | None
    num_features: Annotated[int, Meta(ge=0, le=MAX_FEATURES)]
    features: bytes | None
    offsets_ns: bytes | None
    answer: Annotated[int, Meta(ge=0, le=2)]


class _ArrayWire(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    dtype: Literal["f4", "i4", "i8"]
    shape: Annotated[list[_Dimension], Meta(min_length=1, max_length=4)]
    data: bytes


class _ResultWire(_Wire, tag="o"):
    stream: _Name
    epoch: _Count
    sequence: _Count
    num_events: _Dimension
    event_ns: _Time
    arrival_ns: _Time
    start_ns: _Time
    end_ns: _Time
    flags: Annotated[int, Meta(ge=0, le=255)]
    missing: _Count
    heads: Annotated[dict[Annotated[str, Meta(min_length=1, max_length=64)], _ArrayWire], Meta(max_length=MAX_HEADS)]


class _ControlWire(_Wire, tag="c"):
    stream: _Name
    epoch: _Count
    op: ControlOp
    request: _Count
    value: _Count


class _ReplyWire(_Wire, tag="a"):
    stream: _Name
    epoch: _Count
    request: _Count
    value: _Count


class _HeartbeatWire(_Wire, tag="h"):
    stream: _Name
    epoch: _Count
    next_sequence: _Count
    time_ns: _Time


class _FaultWire(_Wire, tag="x"):
    stream: Annotated[str, Meta(max_length=128)]
    request: _Count
    code: Annotated[str, Meta(max_length=32, pattern=r"^[a-z_]+\Z")]
    message: Annotated[str, Meta(max_length=512)]


class _Head(msgspec.Struct, array_like=True, gc=False):
    """The first two elements of any version's message. What follows is skipped, never built."""

    kind: str
    version: int


_AnyWire = _FrameWire | _ResultWire | _ControlWire | _ReplyWire | _HeartbeatWire | _FaultWire
_KINDS: dict[str, Any] = {str(wire.__struct_config__.tag): wire for wire in get_args(_AnyWire)}
# Messages whose wire fields are the version and then their own, in order.
_PLAIN = {Control: _ControlWire, Reply: _ReplyWire, Heartbeat: _HeartbeatWire, Fault: _FaultWire}
_MESSAGES = {wire: message for message, wire in _PLAIN.items()}
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_AnyWire)
_head_decoder = msgspec.msgpack.Decoder(_Head)
_UNDECODABLE = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)
_F4, _I4, _I8 = np.dtype("<f4"), np.dtype("<i4"), np.dtype("<i8")
_DTYPES = {"f4": _F4, "i4": _I4, "i8": _I8}
# What breaks a line of a log or ends a C string. Not str.isprintable: its answer changes with Python's Unicode tables.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PATH = re.compile(r" - at `(?:key` in `)?\$\[(\d+)\](.*)`")


def encode(message: Message) -> bytes:
    """Return the wire form of a message. What it returns, `decode` accepts.

    `ids` of any integer dtype are sent as int32; `features` must be float32, `offsets_ns` int64. Heads are sent as
    float32 (from any float dtype; what is beyond its range becomes infinity), int32 or int64. A fault's text is cut
    to 512 characters.

    Raises:
        FrameError: not a message, a field outside its range, a column of another dtype or shape, or more than
            `MAX_MESSAGE_BYTES` bytes (code "too_large").
    """
    wire = _to_wire(message)
    try:
        data = _encoder.encode(wire)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise FrameError(f"{type(message).__name__}: expected fields of the declared types, found: {error}") from None
    _check(_parse(data))  # by the receiver's rules, so that both directions have the same ones
    return data


def decode(data: bytes, *, arrival_ns: int = 0) -> Message:
    """Return the message in `data`. `arrival_ns` is stamped on frames. Arrays are read-only.

    Raises:
        FrameError: anything else than one valid message; code "too_large", "bad_version" or "bad_frame".
        TypeError: `data` is not `bytes`. The length of a view need not be its number of bytes.
    """
    if not isinstance(data, bytes):
        raise TypeError(f"data: expected bytes, found {type(data).__name__}")
    w = _parse(data)
    arrays = _check(w)
    if isinstance(w, _FrameWire):
        ids, features, offsets = arrays
        answer = _ANSWERS[w.answer]
        return Frame(w.stream, w.epoch, w.sequence, w.event_ns, ids, features, offsets, answer, arrival_ns)
    if isinstance(w, _ResultWire):
        times = (w.event_ns, w.arrival_ns, w.start_ns, w.end_ns)
        heads = dict(zip(w.heads, arrays, strict=True))
        return Result(w.stream, w.epoch, w.sequence, w.num_events, *times, heads, w.flags, w.missing)
    return _MESSAGES[type(w)](*msgspec.structs.astuple(w)[1:])


def _to_wire(message: Message) -> _AnyWire:
    if isinstance(message, Frame):
        return _frame_to_wire(message)
    if isinstance(message, Result):
        return _result_to_wire(message)
    if isinstance(message, Fault) and isinstance(message.message, str):
        # A report must get out: half a surrogate pair, as in an undecodable file name, is spelled out.
        text = message.message[:512].encode("utf-8", "backslashreplace").decode()[:512]
        return _FaultWire(WIRE_VERSION, message.stream, message.request, message.code, text)
    if type(message) not in _PLAIN:
        raise FrameError(f"message: expected a Frame, Result or other message, found {type(message).__name__}")
    wire = _PLAIN[type(message)]
    return wire(WIRE_VERSION, *(getattr(message, name) for name in wire.__struct_fields__[1:]))


def _frame_to_wire(frame: Frame) -> _FrameWire:
    ids = features = offsets = n = None
    width = 0
    if frame.ids is not None:
        ids = _ids_bytes(frame.ids)
        n = len(frame.ids)
    if frame.features is not None:
        features = _rows_bytes("features", frame.features, _F4, 2, n)
        n, width = frame.features.shape
    if frame.offsets_ns is not None:
        offsets = _rows_bytes("offsets_ns", frame.offsets_ns, _I8, 1, n)
    if not isinstance(frame.answer, str) or frame.answer not in _ANSWERS:
        raise FrameError(f"answer: expected one of {', '.join(_ANSWERS)}, found {_brief(frame.answer)}")
    head = (WIRE_VERSION, frame.stream, frame.epoch, frame.sequence, frame.event_ns)
    return _FrameWire(*head, n or 0, ids, width, features, offsets, _ANSWERS.index(frame.answer))


def _result_to_wire(result: Result) -> _ResultWire:
    if not isinstance(result.heads, dict):
        raise FrameError(f"heads: expected a dict of arrays, found {_brief(result.heads)}")
    heads = {name: _head_to_wire(f"head {name!r:.66}", array) for name, array in result.heads.items()}
    head = (WIRE_VERSION, result.stream, result.epoch, result.sequence, result.num_events)
    times = (result.event_ns, result.arrival_ns, result.start_ns, result.end_ns)
    return _ResultWire(*head, *times, result.flags, result.missing, heads)


def _head_to_wire(name: str, array: np.ndarray) -> _ArrayWire:
    code: Literal["f4", "i4", "i8"]
    if isinstance(array, np.ndarray) and array.dtype.kind == "f":
        code = "f4"
    elif isinstance(array, np.ndarray) and array.dtype.kind in "iu" and np.can_cast(array.dtype, _I8):
        code = "i4" if np.can_cast(array.dtype, _I4) else "i8"
    else:
        raise FrameError(f"{name}: expected an array of floats or of integers that fit int64, found {_brief(array)}")
    return _ArrayWire(code, list(array.shape), _bytes(name, array, _DTYPES[code]))


def _ids_bytes(ids: Any) -> bytes:
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise FrameError(f"ids: expected an array of integers, [n], found {_brief(ids)}")
    if ids.dtype != _I4 and len(ids) and not -(2**31) <= int(ids.min()) <= int(ids.max()) < 2**31:
        raise FrameError(f"ids: expected values that fit int32, found {ids.min()} to {ids.max()}")
    return _bytes("ids", ids, _I4)


def _rows_bytes(name: str, array: Any, dtype: np.dtype, ndim: int, n: int | None) -> bytes:
    right = isinstance(array, np.ndarray) and array.dtype == dtype and array.ndim == ndim
    if not right or (n is not None and len(array) != n):
        expected = ", ".join(["n" if n is None else str(n), "d"][:ndim])
        raise FrameError(f"{name}: expected an array of {dtype}, [{expected}], found {_brief(array)}")
    return _bytes(name, array, dtype)


def _bytes(name: str, array: np.ndarray, dtype: np.dtype) -> bytes:
    size = array.size * dtype.itemsize
    if size > MAX_MESSAGE_BYTES:  # before anything of that size is copied
        raise FrameError(f"{name}: expected at most {MAX_MESSAGE_BYTES} bytes a message, found {size}", "too_large")
    if array.dtype == dtype:
        return array.tobytes()
    with np.errstate(over="ignore"):
        return array.astype(dtype).tobytes()


def _brief(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}, {list(value.shape)}"
    return f"{value!r:.40}" if isinstance(value, str) else type(value).__name__


def _parse(data: bytes) -> _AnyWire:
    """Return what the types alone can vouch for."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise FrameError(f"message: expected at most {MAX_MESSAGE_BYTES} bytes, found {len(data)}", "too_large")
    try:
        return _decoder.decode(data)
    except _UNDECODABLE as error:
        raise _refusal(data, str(error)[:200]) from None


def _refusal(data: bytes, reason: str) -> FrameError:
    try:
        head = _head_decoder.decode(data)
    except _UNDECODABLE:
        return FrameError(f"message: expected one MessagePack array [kind, version, …], found: {reason}")
    if head.version != WIRE_VERSION:
        return FrameError(f"version: expected {WIRE_VERSION}, found {head.version}", "bad_version")
    if head.kind not in _KINDS:
        return FrameError(f"kind: expected one of {', '.join(_KINDS)}, found {_brief(head.kind)}")
    fields, at = _KINDS[head.kind].__struct_fields__, _PATH.search(reason)
    if at is None:
        return FrameError(f"message: expected {head.kind!r} and its {len(fields)} fields, found: {reason}")
    reason = _PATH.sub("", reason).replace("Invalid enum value", "Expected a known value, found")
    return FrameError(f"{fields[int(at[1]) - 1]}{at[2]}: e{reason[1:]}".replace(", got ", ", found "))


def _check(w: _AnyWire) -> Any:
    """Check what the types cannot say. Returns a frame's three columns, or the arrays of a result's heads."""
    if w.stream or not isinstance(w, _FaultWire):
        _check_name("stream", w.stream)
    if not isinstance(w, _FrameWire | _ResultWire):
        return None
    if w.sequence + w.num_events > _MAX_INT:
        raise FrameError(f"sequence: expected at most {_MAX_INT} - num_events, found {w.sequence}")
    if isinstance(w, _FrameWire):
        return _check_columns(w)
    return [_check_head(name, array, w.num_events) for name, array in w.heads.items()]


def _check_name(field: str, name: str) -> None:
    if not name.isprintable() and _UNPRINTABLE.search(name):
        raise FrameError(f"{field}: expected a name without control characters, found {name!r}")


def _check_columns(w: _FrameWire) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    n, width = w.num_events, w.num_features
    if (w.features is None) != (width == 0):
        raise FrameError(f"features: expected nil exactly where num_features is 0, found num_features {width}")
    if w.ids is None and w.features is None:
        raise FrameError("frame: expected ids or features, found neither")
    ids = None if w.ids is None else _column("ids", w.ids, _I4, n)
    features = offsets = None
    if w.features is not None:
        features = _column("features", w.features, _F4, n * width)
        if not _finite(features):
            raise FrameError("features: expected finite floats, found NaN or infinity")
        features = features.reshape(n, width)
    if w.offsets_ns is not None:
        offsets = _column("offsets_ns", w.offsets_ns, _I8, n)
        if w.event_ns + int(offsets.min()) < -(2**63) or w.event_ns + int(offsets.max()) > _MAX_INT:
            raise FrameError("offsets_ns: expected times event_ns + offset that fit int64, found one that does not")
    return ids, features, offsets


def _finite(floats: np.ndarray) -> bool:
    if floats.size <= 32:  # costs less than two NumPy calls; so few float32 cannot overflow a float64 sum
        return math.isfinite(sum(floats.tolist()))
    return bool(np.isfinite(floats).all())


def _check_head(name: str, array: _ArrayWire, num_events: int) -> np.ndarray:
    _check_name("head", name)
    if array.shape[0] not in (1, num_events):
        raise FrameError(f"head {name!r}: expected 1 or {num_events} rows, found {array.shape[0]}")
    return _column(f"head {name!r}", array.data, _DTYPES[array.dtype], math.prod(array.shape)).reshape(array.shape)


def _column(name: str, data: bytes, dtype: np.dtype, size: int) -> np.ndarray:
    if len(data) != size * dtype.itemsize:  # Python's integers: a claimed shape cannot overflow
        raise FrameError(f"{name}: expected {size * dtype.itemsize} bytes, found {len(data)}")
    return np.frombuffer(data, dtype)


# --- connectors ------------------------------------------------------------------------------------------------------


def _nothing() -> None:
    pass


@dataclass(slots=True, eq=False)
class Delivery:
    """A message handed out by a source, with its acknowledgement.

    `acknowledge()` tells the transport that the message is safe (answered, journaled, or dropped and counted). It is
    called once, from the event loop's thread, and never blocks.
    """

    message: Message
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
    def frames(self) -> AsyncIterator[Sequence[Delivery]]: ...  # noqa: D102
    async def close(self) -> None: ...  # noqa: D102


class Sink(Protocol):
    """Sends messages to a transport. `send` returns when the transport has taken the message.

    A transport with backpressure makes `send` wait; one without drops and counts it in `stats.dropped`.
    `close` gives what is queued a bounded time to leave.
    """

    name: str
    stats: ConnectorStats

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc: Any) -> None: ...
    async def send(self, message: Message) -> None: ...  # noqa: D102
    async def close(self) -> None: ...  # noqa: D102
