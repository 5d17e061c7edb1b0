"""What several connectors share: decoding with counters, and the heartbeats of a sink."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from streamattn.errors import ConfigError, FrameError
from streamattn.frame import ConnectorStats, Control, Delivery, Frame, Heartbeat, Message, Result, _nothing

_MAX_BEATING_STREAMS = 4096
_BEATS_IN_A_ROW = 64  # before the event loop gets its turn

_Number = TypeVar("_Number", int, float)

logger = logging.getLogger("streamattn.connectors")


class Decoder(Protocol):
    """Turns the bytes of one transport message into a message; `streamattn.frame.decode` is the default.

    Bytes that it cannot read raise `FrameError`: counted, dropped, harmless. Any other exception ends the source.
    """

    def __call__(self, data: bytes, *, arrival_ns: int) -> Message:
        """Return the message in `data`, a frame stamped with `arrival_ns`."""
        ...


class Intake:
    """Decodes what a source received and counts it."""

    def __init__(self, name: str, stats: ConnectorStats, decoder: Decoder) -> None:
        self._name = name
        self._stats = stats
        self._decoder = decoder

    def take(self, data: bytes, arrival_ns: int) -> Message | None:
        """Return the message in `data`, or None where there is none: then it has been counted as bad."""
        try:
            message = self._decoder(data, arrival_ns=arrival_ns)
        except FrameError as error:
            self.refuse(str(error))
            return None
        self._stats.messages += 1
        self._stats.num_bytes += len(data)
        return message

    def refuse(self, why: str) -> None:
        """Count a bad message. The first one is logged as a warning, the others would only fill the log."""
        level = logging.DEBUG if self._stats.bad_messages else logging.WARNING
        self._stats.bad_messages += 1
        logger.log(level, "%s: dropped a bad message (counted from now on): %s", self._name, why)


def deliver(message: Message, acknowledge: Callable[[], None] = _nothing) -> Delivery:
    """Return a `Delivery`. Which kinds of message make sense is for the consumer to decide, not for a transport."""
    return Delivery(message, acknowledge)


class Beats:
    """Remembers the end of each published stream, so that a heartbeat can tell when its last messages were lost.

    The last 4,096 streams are remembered. `interval` is in seconds; 0 turns heartbeats off.
    """

    def __init__(self, interval: float) -> None:
        self.interval = check_number("heartbeat", interval, 0, 3600)
        self._streams: OrderedDict[str, tuple[int, int, float]] = OrderedDict()  # epoch, next_sequence, time of message
        self._silent: set[str] = set()  # nothing followed their last message yet, not even a heartbeat

    def note(self, message: Message) -> None:
        """Remember where the message's stream ends; a `close` ends its heartbeats."""
        if not self.interval:
            return
        match message:
            case Frame():
                end = message.sequence + len(message)
            case Result():
                end = message.sequence + message.num_events
            case Control(op="close"):
                self._streams.pop(message.stream, None)
                self._silent.discard(message.stream)
                return
            case _:
                return
        stream = message.stream
        self._streams[stream] = (message.epoch, end, time.monotonic())
        self._streams.move_to_end(stream)
        self._silent.add(stream)
        if len(self._streams) > _MAX_BEATING_STREAMS:
            self._silent.discard(self._streams.popitem(last=False)[0])

    def last_words(self) -> list[Heartbeat]:
        """Return the heartbeats of the streams whose last message was followed by none."""
        return [self._beat(stream) for stream in self._silent]

    async def idle(self) -> list[Heartbeat]:
        """Wait until heartbeats are due and return them: those of the streams that were idle for an interval."""
        await asyncio.sleep(self.interval)
        before = time.monotonic() - self.interval
        due = [stream for stream, (_, _, at) in self._streams.items() if at <= before]
        self._silent.difference_update(due)
        return [self._beat(stream) for stream in due]

    def _beat(self, stream: str) -> Heartbeat:
        epoch, end, _ = self._streams[stream]
        return Heartbeat(stream, epoch, end, time.time_ns())


async def spread(beats: Iterable[Heartbeat]):
    """Yield heartbeats, giving the event loop a turn now and then: thousands of streams must not delay a result."""
    for i, beat in enumerate(beats):
        if i % _BEATS_IN_A_ROW == _BEATS_IN_A_ROW - 1:
            await asyncio.sleep(0)
        yield beat


def check_number(name: str, value: _Number, low: float, high: float) -> _Number:
    """Return `value`.

    Raises:
        ConfigError: it is not within [low, high].
    """
    if not low <= value <= high:
        raise ConfigError(f"{name}: expected {low:g} to {high:g}, found {value:g}")
    return value
