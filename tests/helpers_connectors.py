"""Rigs for the contract suite: each feeds a real source through its real transport."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from streamattn.connectors.files import FileSink, FileSource
from streamattn.connectors.memory import MemorySource
from streamattn.connectors.mqtt import MqttSink, MqttSource
from streamattn.connectors.zeromq import ZmqSink, ZmqSource
from streamattn.frame import Delivery, Frame, Heartbeat, Message, Sink, Source, encode

DEADLINE = 60.0  # seconds until something that should have happened counts as hung; nothing is timed
SYNC = "sync"  # stream that tells a rig that its subscription is in force

Item = Message | bytes


def frame(stream: str, sequence: int, num_events: int = 1) -> Frame:
    return Frame(stream, 1, sequence, 0, ids=np.arange(num_events, dtype=np.int32))


def frames(count: int, streams: int = 1, num_events: int = 1) -> list[Frame]:
    """`count` frames, the streams taking turns, each counting its own events from 0."""
    return [frame(f"s{i % streams}", i // streams * num_events, num_events) for i in range(count)]


async def eventually(true: Callable[[], Any], what: str = "the condition") -> None:
    end = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < end, f"{what} did not come true within {DEADLINE} s"
        await asyncio.sleep(0.002)


async def settled(value: Callable[[], int]) -> int:
    """Return a counter's value once it has stood still for a while."""
    last, since = value(), time.monotonic()
    while time.monotonic() - since < 0.3:
        await asyncio.sleep(0.01)
        if value() != last:
            last, since = value(), time.monotonic()
    return last


async def collect(source: Source, count: int, into: list[Delivery] | None = None) -> list[Delivery]:
    """Iterate until `count` frames have come (heartbeats and `SYNC` do not count); acknowledge each."""
    found: list[Delivery] = [] if into is None else into
    async with asyncio.timeout(DEADLINE):
        if len(found) < count:
            async for batch in source.frames():
                assert len(batch) > 0
                for delivery in batch:
                    if isinstance(delivery.message, Frame):
                        found.append(delivery)
                    delivery.acknowledge()
                if len(found) >= count:
                    break
    return found


def sequences(deliveries: Iterable[Delivery]) -> dict[str, list[int]]:
    by_stream: dict[str, list[int]] = {}
    for delivery in deliveries:
        assert isinstance(delivery.message, Frame)
        by_stream.setdefault(delivery.message.stream, []).append(delivery.message.sequence)
    return by_stream


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def footprint() -> tuple[int, int, int]:
    """Tasks, threads (the loop's own pool aside) and open descriptors."""
    tasks = [task for task in asyncio.all_tasks() if not task.done()]
    threads = [t for t in threading.enumerate() if not t.name.startswith("asyncio_")]
    return len(tasks), len(threads) + _native_threads(), len(os.listdir("/proc/self/fd"))


def _native_threads() -> int:
    names = [Path(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task")]
    with contextlib.suppress(FileNotFoundError):
        return sum(name.read_text().startswith("ZMQbg") for name in names)
    return -1


class Rig:
    """How a contract test gets a source that is being fed. `fed(items)` yields one and feeds it in the background."""

    waits = True  # a slow consumer loses nothing
    holds_producer = True  # ... and makes the producer wait
    sent = 0  # items that the producer could hand over so far

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def source(self) -> Source:
        raise NotImplementedError

    def peer(self, source: Source) -> contextlib.AbstractAsyncContextManager[Any]:
        raise NotImplementedError

    async def send(self, peer: Any, item: Item) -> None:
        raise NotImplementedError

    async def joined(self, source: Source, peer: Any) -> None:
        """Return when what `peer` sends reaches `source`."""

    def stop(self) -> None:
        """End what the rig started."""

    async def feed(self, peer: Any, items: Iterable[Item]) -> None:
        for item in items:
            await self.send(peer, item)
            self.sent += 1

    @contextlib.asynccontextmanager
    async def fed(self, items: Iterable[Item]) -> AsyncIterator[Source]:
        async with self.source() as source, self.peer(source) as peer:
            await self.joined(source, peer)
            feeding = asyncio.create_task(self.feed(peer, items))
            try:
                yield source
            finally:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)


class MemoryRig(Rig):
    def source(self) -> MemorySource:
        return MemorySource(capacity=64)

    @contextlib.asynccontextmanager
    async def peer(self, source: Source) -> AsyncIterator[Source]:
        yield source

    async def send(self, peer: MemorySource, item: Item) -> None:
        await peer.put(item)


class FileRig(Rig):
    """The file is written before it is read: a recording does not grow while it is replayed."""

    holds_producer = False

    @property
    def path(self) -> Path:
        return self.folder / "recording"

    def source(self) -> FileSource:
        if not self.path.exists():
            self.path.write_bytes(b"streamattn recording 1\n")
        return FileSource(self.path, speed=float("inf"))

    @contextlib.asynccontextmanager
    async def fed(self, items: Iterable[Item]) -> AsyncIterator[Source]:
        async with FileSink(self.path) as sink:
            for item in items:
                data = item if isinstance(item, bytes) else encode(item)
                sink._append(len(data).to_bytes(4, "little") + bytes(8) + data)
        async with self.source() as source:
            yield source


class ZmqRig(Rig):
    """One side of a socket pair listens; `source_binds` says which."""

    source_binds = True
    patterns = ("pull", "push")
    hwm = 16

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.endpoint = f"tcp://127.0.0.1:{free_port()}"

    def source(self) -> ZmqSource:
        return ZmqSource(self.patterns[0], [self.endpoint], bind=self.source_binds, hwm=self.hwm)  # type: ignore[arg-type]

    def peer(self, source: Source) -> Sink:
        bind = not self.source_binds
        return ZmqSink(self.patterns[1], [self.endpoint], bind=bind, hwm=self.hwm, heartbeat=0)  # type: ignore[arg-type]

    async def send(self, peer: ZmqSink, item: Item) -> None:
        if isinstance(item, bytes):
            parts = [item] if self.patterns[1] == "push" else [b"raw", item]
            while True:
                try:
                    peer._link.socket.send_multipart(parts, zmq.NOBLOCK)
                    return
                except zmq.Again:
                    await asyncio.sleep(0.001)
        await peer.send(item)


class PullConnectsRig(ZmqRig):
    source_binds = False


class SubRig(ZmqRig):
    waits = False
    source_binds = False
    patterns = ("sub", "pub")
    hwm = 20_000  # the contract's messages all fit: PUB drops what does not

    async def joined(self, source: Source, peer: ZmqSink) -> None:
        """A PUB socket drops everything until it has heard of the subscription."""

        async def knock() -> None:
            while True:
                await peer.send(Heartbeat(SYNC, 1, 0, 0))
                await asyncio.sleep(0.005)

        knocking = asyncio.create_task(knock())
        async with asyncio.timeout(DEADLINE):
            async for _ in source.frames():
                break
        knocking.cancel()
        await asyncio.gather(knocking, return_exceptions=True)


class SubBindsRig(SubRig):
    source_binds = True


class Broker:
    """A Mosquitto of our own, on a free loopback port. Its queues are not limited: its defaults drop messages."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("mosquitto") or shutil.which("/usr/sbin/mosquitto")
        if program is None:
            pytest.skip("mosquitto is not installed: apt-get install mosquitto")
        self.port = free_port()
        self._config = folder / "mosquitto.conf"
        self._config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\n"
            f"persistence true\npersistence_location {folder}/\nuser root\n"
        )
        self._command = [program, "-c", str(self._config)]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        end = time.monotonic() + DEADLINE
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < end, "mosquitto did not start"
                assert self._process.poll() is None, "mosquitto ended at once"
                time.sleep(0.01)

    def stop(self) -> None:
        """Mosquitto writes the sessions to disk when it is told to stop."""
        self._process.terminate()
        self._process.wait(DEADLINE)


class MqttRig(Rig):
    """Through a real broker, which stands between the two: the producer waits for it, not for the consumer."""

    holds_producer = False
    qos = 1

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.broker = Broker(folder)

    def source(self, topic: str = "sa/in/#") -> MqttSource:
        return MqttSource("127.0.0.1", self.broker.port, (topic,), qos=self.qos, client_id="engine")

    def peer(self, source: Source) -> MqttSink:
        return MqttSink("127.0.0.1", self.broker.port, "sa/in/", qos=self.qos, heartbeat=0)

    async def send(self, peer: MqttSink, item: Item) -> None:
        if isinstance(item, bytes):
            await peer._publish("raw", item)
        else:
            await peer.send(item)

    async def feed(self, peer: Any, items: Iterable[Item]) -> None:
        for together in batched(items, 20):
            await asyncio.gather(*(self.send(peer, item) for item in together))
            self.sent += len(together)

    def stop(self) -> None:
        self.broker.stop()


def batched(items: Iterable[Item], size: int) -> Iterable[tuple[Item, ...]]:
    iterator = iter(items)
    return iter(lambda: tuple(islice(iterator, size)), ())


class Mqtt0Rig(MqttRig):
    """QoS 0 has no backpressure: a consumer that stalls for more than `receive_maximum` messages loses the rest."""

    waits = False
    qos = 0

    def source(self, topic: str = "sa/in/#") -> MqttSource:
        return MqttSource("127.0.0.1", self.broker.port, (topic,), qos=0, receive_maximum=20_000)


RIGS: dict[str, type[Rig]] = {
    "memory": MemoryRig,
    "file": FileRig,
    "zmq-pull": ZmqRig,
    "zmq-pull-connects": PullConnectsRig,
    "zmq-sub": SubRig,
    "zmq-sub-binds": SubBindsRig,
    "mqtt-qos1": MqttRig,
    "mqtt-qos0": Mqtt0Rig,
}
WITH_PEER = [name for name in RIGS if name.startswith("zmq")]
NETWORKED = [name for name in RIGS if name not in ("memory", "file")]
WAITING = [name for name, rig in RIGS.items() if rig.waits]
