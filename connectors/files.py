"""Record messages to a file and replay them: as recorded, faster, or as fast as they are wanted.

A recording is a header line and records: length (u32), monotonic time of receipt in nanoseconds (i64), payload; all
little-endian. It is only ever appended to, so a crash can tear the last record and no other.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import os
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO, Self

from streamattn.connectors.base import Decoder, Intake, deliver, logger
from streamattn.errors import ConfigError, ConnectError, ConnectorError, SendError
from streamattn.frame import MAX_MESSAGE_BYTES, ConnectorStats, Delivery, Frame, Message, Sink, Source, decode, encode

_MAGIC = b"streamattn recording "
_HEADER = _MAGIC + b"1\n"
_RECORD = struct.Struct("<Iq")
_BUDGET = 512  # messages of one wake-up
_BUFFER_BYTES = 1 << 18


class FileSource(Source):
    """Replays a recording once.

    Args:
        path: the file that a `FileSink` wrote.
        speed: 1 keeps the recorded pace, 2 halves the pauses, `inf` leaves them out. A consumer that is slower than
            the pace is not waited for: what is late comes at once.
        decoder: what reads the payloads.

    `arrival_ns` of a frame is the time of its replay. A torn last record is counted in `stats.bad_messages`.
    """

    def __init__(self, path: Path, *, speed: float = 1.0, decoder: Decoder = decode) -> None:
        if not speed > 0:
            raise ConfigError(f"speed: expected more than 0, or inf, found {speed:g}")
        self.name = f"file {path}"
        self.stats = ConnectorStats()
        self._path = path
        self._speed = speed
        self._intake = Intake(self.name, self.stats, decoder)
        self._file: BinaryIO | None = None
        self._next: tuple[int, bytes] | None = None  # due time and payload
        self._ready: list[Delivery] = []
        self._due_ns = 0
        self._recorded_ns: int | None = None  # time in the record before
        self._ended = False
        self._closing = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Open the file.

        Raises:
            ConnectError: there is no such file, or it is no recording.
        """
        try:
            self._file = self._path.open("rb", buffering=_BUFFER_BYTES)
        except OSError as error:
            raise ConnectError(f"{self.name}: expected a recording: {error.strerror}") from None
        try:
            _check_header(self.name, self._file)
        except ConnectError:
            self._file.close()
            raise
        return self

    async def __aexit__(self, *exc: Any) -> None:
        """Close it."""
        await self.close()

    async def frames(self) -> AsyncIterator[list[Delivery]]:
        """Yield what is due, at most 512 messages at a time, until the file ends or is closed.

        Raises:
            ConnectorError: the file is damaged at the offset it names; all records before it have been yielded.
        """
        while not self._closing.is_set():
            self._collect()
            if self._ready:
                batch, self._ready = self._ready, []
                yield batch
            if self._ended and self._next is None:
                return
            await self._until(time.monotonic_ns() if self._next is None else self._next[0])

    async def close(self) -> None:
        """End the iteration and close the file."""
        self._closing.set()
        if self._file is not None:
            self._file.close()

    def _collect(self) -> None:
        now_ns = time.monotonic_ns()
        for _ in range(_BUDGET):
            if self._next is None:
                self._next = self._read()
            if self._next is None or self._next[0] > now_ns:
                return
            message = self._intake.take(self._next[1], now_ns)
            self._next = None
            if message is not None:
                self._ready.append(deliver(message))

    def _read(self) -> tuple[int, bytes] | None:
        if self._ended:
            return None
        if self._file is None:
            raise ConnectorError(f"{self.name}: expected `async with` around its use, found it not opened")
        offset = self._file.tell()
        head = self._file.read(_RECORD.size)
        if len(head) == _RECORD.size:
            length, recorded_ns = _RECORD.unpack(head)
            if not 0 < length <= MAX_MESSAGE_BYTES:
                return self._damaged(offset, length)
            data = self._file.read(length)
            if len(data) == length:
                return self._schedule(recorded_ns), data
        self._ended = True
        if head:
            self._intake.refuse(f"the recording ends inside the record at byte {offset}")
        return None

    def _damaged(self, offset: int, length: int) -> None:
        if not self._ready:  # else what was read is handed out first, and this record is read again
            raise ConnectorError(
                f"{self.name}: damaged at byte {offset}: expected a length of 1 to {MAX_MESSAGE_BYTES}, found {length}"
            )
        assert self._file is not None
        self._file.seek(offset)

    def _schedule(self, recorded_ns: int) -> int:
        """Return when the record is due. The recorded clock starts anew when the machine does: never wait for that."""
        if self._recorded_ns is None:
            self._due_ns = time.monotonic_ns()
        elif math.isfinite(self._speed):
            self._due_ns += round(max(0, recorded_ns - self._recorded_ns) / self._speed)
        self._recorded_ns = recorded_ns
        return self._due_ns

    async def _until(self, due_ns: int) -> None:
        try:
            async with asyncio.timeout(max(0, due_ns - time.monotonic_ns()) / 1e9):
                await self._closing.wait()
        except TimeoutError:
            return


class FileSink(Sink):
    """Appends messages to a recording. Each is in the operating system's hands when `send` returns.

    A torn record at the end, left by a crash, is cut off first. One process at a time can record to a file.
    """

    def __init__(self, path: Path) -> None:
        self.name = f"file {path}"
        self.stats = ConnectorStats()
        self._path = path
        self._fd = -1

    async def __aenter__(self) -> Self:
        """Open the file, make it if there is none.

        Raises:
            ConnectError: it cannot be written, is no recording, is damaged, or another process is recording to it.
        """
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConnectError(f"{self.name}: cannot record there: {error.strerror}") from None
        try:
            self._prepare()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc: Any) -> None:
        """Close it."""
        await self.close()

    async def send(self, message: Message) -> None:
        """Append a message.

        Raises:
            SendError: the sink is not open, or the disk took no more; the recording stays whole.
            FrameError: the message has no wire form.
        """
        if self._fd < 0:
            raise SendError(f"{self.name}: expected an open sink, found a closed one")
        data = encode(message)
        received_ns = message.arrival_ns if isinstance(message, Frame) and message.arrival_ns else time.monotonic_ns()
        self._append(_RECORD.pack(len(data), received_ns) + data)
        self.stats.messages += 1
        self.stats.num_bytes += len(data)

    async def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _prepare(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConnectError(f"{self.name}: another process is recording to it: stop it or name another") from None
        size = os.fstat(self._fd).st_size
        if size < len(_HEADER) and _HEADER.startswith(os.pread(self._fd, size, 0)):
            os.ftruncate(self._fd, 0)
            self._append(_HEADER)
            return
        with open(self._fd, "rb", buffering=_BUFFER_BYTES, closefd=False) as file:
            _check_header(self.name, file)
            whole = _end_of_records(self.name, file, size)
        if whole < size:
            logger.warning("%s: cut off %d bytes of a torn record at byte %d", self.name, size - whole, whole)
            os.ftruncate(self._fd, whole)

    def _append(self, record: bytes) -> None:
        end = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, record)
        except OSError as error:
            raise SendError(f"{self.name}: {error.strerror}") from None
        if written < len(record):  # a full disk took a part of it
            os.ftruncate(self._fd, end)
            raise SendError(f"{self.name}: the disk took {written} of {len(record)} bytes")


def _check_header(name: str, file: BinaryIO) -> None:
    header = file.read(len(_HEADER))
    if not header.startswith(_MAGIC):
        raise ConnectError(f"{name}: expected a recording of streamattn, found {header[:16]!r} at its start")
    if header != _HEADER:
        raise ConnectError(f"{name}: expected version 1 of a recording, found {header[len(_MAGIC) :]!r}")


def _end_of_records(name: str, file: BinaryIO, size: int) -> int:
    """Return the offset behind the last whole record."""
    offset = len(_HEADER)
    while offset + _RECORD.size <= size:
        file.seek(offset)
        length, _ = _RECORD.unpack(file.read(_RECORD.size))
        if not 0 < length <= MAX_MESSAGE_BYTES:
            raise ConnectError(f"{name}: damaged at byte {offset}: expected a length, found {length}")
        if offset + _RECORD.size + length > size:
            break
        offset += _RECORD.size + length
    return offset
