"""Runtime: sources -> engine -> sinks on one event loop, with a clean start, drain and stop.

A frame is acknowledged to its source when its answer has been handed to every sink, or when it was dropped and counted.
A source or sink that fails is reported and left out; the others go on. The run ends when all sources have ended, on
`stop()`, or when no sink is left.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from streamattn.async_engine import AsyncEngine
from streamattn.engine import Engine, Outcome
from streamattn.errors import ConfigError, ConnectorError, EngineError
from streamattn.frame import Control, Delivery, Frame, Heartbeat, Message, Result, Sink, Source
from streamattn.metrics import LatencyHistogram

log = logging.getLogger("streamattn")


@dataclass(slots=True)
class RuntimeStats:
    """What a run has done so far. Latencies are from our receipt of a frame to the end of its step."""

    results: int = 0
    events: int = 0
    faults: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # frames by reason
    failed: list[str] = field(default_factory=list)  # connectors that failed, with the reason
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)


class Runtime:
    """Joins sources and sinks to an engine.

    Args:
        engine: with `auto_open` for topics whose streams are not known beforehand.
        sources, sinks: at least one each; entered and closed here.
        in_flight: frames under way at once, from receipt to the sinks; more wait in the transport.
        on_progress: called after every delivery with the stats.
    """

    def __init__(
        self,
        engine: Engine,
        sources: Sequence[Source],
        sinks: Sequence[Sink],
        *,
        in_flight: int = 4096,
        on_progress: Callable[[RuntimeStats], None] | None = None,
    ) -> None:
        if not sources or not sinks:
            raise ConfigError(f"runtime: expected a source and a sink, found {len(sources)} and {len(sinks)}")
        self.engine, self.sources, self.sinks = engine, list(sources), list(sinks)
        self.in_flight, self.on_progress = in_flight, on_progress
        self.stats = RuntimeStats()
        self._outgoing: asyncio.Queue[tuple[Sequence[Message], Delivery | None]] = asyncio.Queue()
        self._room = asyncio.Semaphore(in_flight)
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Ask a run to stop reading, finish what was accepted, and return."""
        self._stop.set()

    async def run(self) -> RuntimeStats:
        """Run until the sources end or `stop` is called; return the stats.

        Raises:
            ConnectorError: a source or sink could not be set up, or every source or every sink has failed.
        """
        entered: list[Source | Sink] = []
        try:
            for connector in (*self.sinks, *self.sources):  # sinks first: no answer without a way out
                await connector.__aenter__()
                entered.append(connector)
            async with AsyncEngine(self.engine, capacity=self.in_flight, on_event=self._event) as running:
                await self._pump(running)
        finally:
            for connector in reversed(entered):
                await connector.__aexit__(None, None, None)
        if len(self.stats.failed) and not self._alive():
            raise ConnectorError("; ".join(self.stats.failed))
        return self.stats

    def _alive(self) -> bool:
        return bool(self.sinks) and bool(self.sources)

    async def _pump(self, running: AsyncEngine) -> None:
        send = asyncio.create_task(self._send(), name="streamattn-send")
        readers = [
            asyncio.create_task(self._read(source, running), name=f"streamattn-read-{source.name}")
            for source in self.sources
        ]
        stop = asyncio.create_task(self._stop.wait(), name="streamattn-stop")
        try:
            everything_read = asyncio.gather(*readers)
            await asyncio.wait({everything_read, stop, send}, return_when=asyncio.FIRST_COMPLETED)
            if not everything_read.done():
                for source in self.sources:
                    await source.close()  # ends the iteration; what was handed out is still answered
            if send.done():
                everything_read.cancel()
                await asyncio.gather(*readers, return_exceptions=True)
                await send  # raises what went wrong
            await everything_read
            await running.drain()
            await self._outgoing.join()
        finally:
            for task in (*readers, stop, send):
                task.cancel()
            await asyncio.gather(*readers, stop, send, return_exceptions=True)

    # --- in ---

    async def _read(self, source: Source, running: AsyncEngine) -> None:
        try:
            async for deliveries in source.frames():
                for delivery in deliveries:
                    if not isinstance(delivery.message, Frame | Control | Heartbeat):
                        self.stats.dropped["no_input"] += 1  # somebody's results on our input topic
                        delivery.acknowledge()
                        continue
                    await self._room.acquire()
                    await running.offer(delivery.message, partial(self._finished, delivery))
        except (ConnectorError, EngineError, OSError) as error:
            self._lost(self.sources, source, error)

    def _lost(self, connectors: list, connector: Source | Sink, error: Exception) -> None:
        log.error("%s failed and is left out: %s", connector.name, error)
        self.stats.failed.append(f"{connector.name}: {error}")
        connectors.remove(connector)

    # --- out ---

    def _finished(self, delivery: Delivery, outcome: Outcome) -> None:
        if outcome.reason:
            self.stats.dropped[outcome.reason] += 1
        self._outgoing.put_nowait((outcome.messages, delivery))  # bounded by `in_flight`

    def _event(self, outcome: Outcome) -> None:
        log.error("%s", outcome.error)
        self.stats.faults += 1
        self._outgoing.put_nowait((outcome.messages, None))

    async def _send(self) -> None:
        while True:
            messages, delivery = await self._outgoing.get()
            try:
                for message in messages:
                    await self._send_one(message)
            finally:
                self._outgoing.task_done()
            if delivery is not None:
                delivery.acknowledge()
                self._room.release()
            if self.on_progress is not None:
                self.on_progress(self.stats)

    async def _send_one(self, message: Message) -> None:
        if isinstance(message, Result):
            self.stats.results += 1
            self.stats.events += message.num_events
            self.stats.latency.record(message.end_ns - message.arrival_ns)
        for sink in list(self.sinks):
            try:
                await sink.send(message)
            except (ConnectorError, OSError) as error:
                self._lost(self.sinks, sink, error)
        if not self.sinks:
            raise ConnectorError("; ".join(self.stats.failed))
