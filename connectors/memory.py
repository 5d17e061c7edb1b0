"""A source fed from code and a sink read from code, for tests, examples and embedding; no transport at all."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar, Self
from weakref import WeakValueDictionary

from streamattn.connectors.base import Decoder, Intake, check_number, deliver
from streamattn.errors import ConnectorError, SendError
from streamattn.frame import ConnectorStats, Delivery, Frame, Message, Sink, Source, decode

_BUDGET = 512  # messages of one wake-up
_REMEMBERED = 65_536  # acknowledged messages


class MemorySource(Source):
    """Yields what `put` or the constructor gave it.

    Args:
        messages: what to begin with, any number of messages (or bytes, which the decoder reads).
        name: shown in logs.
        capacity: messages waiting, above which `put` waits.
        decoder: what reads bytes.

    Attributes:
        acknowledged: the messages acknowledged so far, in order of acknowledgement; the latest 65,536.
        num_acknowledged: how many there were.
    """

    _named: ClassVar[WeakValueDictionary[str, MemorySource]] = WeakValueDictionary()

    def __init__(
        self,
        messages: Iterable[Message | bytes] = (),
        *,
        name: str = "memory",
        capacity: int = 1024,
        decoder: Decoder = decode,
    ) -> None:
        self.name = name
        self.stats = ConnectorStats()
        self.acknowledged: deque[Message] = deque(maxlen=_REMEMBERED)
        self.num_acknowledged = 0
        self._capacity = check_number("capacity", capacity, 1, 1 << 30)
        self._intake = Intake(name, self.stats, decoder)
        self._waiting: deque[Message | bytes] = deque(messages)
        self._ready: list[Delivery] = []
        self._changed = asyncio.Event()
        self._ended = False
        self._closed = False

    @classmethod
    def named(cls, name: str, *, capacity: int = 1024, decoder: Decoder = decode) -> MemorySource:
        """Return the open source `memory://name` of this process; it is made if there is none."""
        source = cls._named.get(name)
        if source is None or source._closed:
            source = cls._named[name] = cls(name=f"memory://{name}", capacity=capacity, decoder=decoder)
        return source

    async def __aenter__(self) -> Self:
        """Return the source; there is nothing to connect."""
        return self

    async def __aexit__(self, *exc: Any) -> None:
        """Close it."""
        await self.close()

    async def put(self, message: Message | bytes) -> None:
        """Append a message; wait while `capacity` messages are waiting to be read.

        Raises:
            SendError: the source was ended or closed.
        """
        while len(self._waiting) >= self._capacity and not self._closed:
            await self._change()
        if self._ended or self._closed:
            raise SendError(f"{self.name}: expected an open source, found a closed one")
        self._waiting.append(message)
        self._changed.set()

    def end(self) -> None:
        """Say that nothing more comes: `frames()` ends after what is waiting."""
        self._ended = True
        self._changed.set()

    async def frames(self) -> AsyncIterator[list[Delivery]]:
        """Yield what is waiting, at most 512 messages at a time, until it ends or is closed."""
        while not self._closed:
            self._collect()
            if self._ready:
                batch, self._ready = self._ready, []
                yield batch
                await asyncio.sleep(0)
            elif self._ended and not self._waiting:
                return
            elif not self._waiting:
                await self._change()

    async def close(self) -> None:
        """End the iteration and every waiting `put`."""
        self._closed = True
        self._changed.set()

    def _collect(self) -> None:
        arrival_ns = time.monotonic_ns()
        for _ in range(min(_BUDGET, len(self._waiting))):
            item = self._waiting.popleft()
            message = self._read(item, arrival_ns)
            if message is not None:
                self._ready.append(deliver(message, self._acknowledgement(message)))
        self._changed.set()

    def _read(self, item: Message | bytes, arrival_ns: int) -> Message | None:
        if isinstance(item, bytes):
            return self._intake.take(item, arrival_ns)
        self.stats.messages += 1
        return replace(item, arrival_ns=arrival_ns) if isinstance(item, Frame) else item

    def _acknowledgement(self, message: Message) -> Callable[[], None]:
        called = False

        def acknowledge() -> None:
            nonlocal called
            if called:
                raise ConnectorError(f"{self.name}: expected one acknowledgement of {message}, found two")
            called = True
            self.num_acknowledged += 1
            self.acknowledged.append(message)

        return acknowledge

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class MemorySink(Sink):
    """Keeps what was sent until it is asked for: `await sink.get()`, `sink.take()` or `async for message in sink`.

    Args:
        name: shown in logs.
        capacity: messages kept, above which `send` waits.
    """

    _named: ClassVar[WeakValueDictionary[str, MemorySink]] = WeakValueDictionary()

    def __init__(self, *, name: str = "memory", capacity: int = 65_536) -> None:
        self.name = name
        self.stats = ConnectorStats()
        self._capacity = check_number("capacity", capacity, 1, 1 << 30)
        self._kept: deque[Message] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    @classmethod
    def named(cls, name: str, *, capacity: int = 65_536) -> MemorySink:
        """Return the open sink `memory://name` of this process; it is made if there is none."""
        sink = cls._named.get(name)
        if sink is None or sink._closed:
            sink = cls._named[name] = cls(name=f"memory://{name}", capacity=capacity)
        return sink

    async def __aenter__(self) -> Self:
        """Return the sink; there is nothing to connect."""
        return self

    async def __aexit__(self, *exc: Any) -> None:
        """Close it."""
        await self.close()

    async def send(self, message: Message) -> None:
        """Keep a message; wait while `capacity` messages are kept.

        Raises:
            SendError: the sink is closed.
        """
        while len(self._kept) >= self._capacity and not self._closed:
            await self._change()
        if self._closed:
            raise SendError(f"{self.name}: expected an open sink, found a closed one")
        self._kept.append(message)
        self.stats.messages += 1
        self._changed.set()

    def take(self) -> list[Message]:
        """Return all that is kept and forget it."""
        taken = list(self._kept)
        self._kept.clear()
        self._changed.set()
        return taken

    async def get(self) -> Message:
        """Return the next message; wait for it.

        Raises:
            ConnectorError: the sink is closed and nothing is left.
        """
        while not self._kept:
            if self._closed:
                raise ConnectorError(f"{self.name}: expected a message, found the sink closed and empty")
            await self._change()
        self._changed.set()
        return self._kept.popleft()

    async def __aiter__(self) -> AsyncIterator[Message]:
        """Yield each message, until the sink is closed and empty."""
        while self._kept or not self._closed:
            if self._kept:
                yield await self.get()
            else:
                await self._change()

    async def close(self) -> None:
        """Take no more messages; what is kept can still be read."""
        self._closed = True
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
