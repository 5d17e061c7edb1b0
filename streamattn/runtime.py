"""Runtime: sources -> engine -> sinks on one event loop, with a clean start, drain and stop.

A frame is acknowledged to its source when its answer has been handed to every sink, or when it was dropped and counted.
A source or sink that fails is reported and left out; the others go on. The run ends when all sources have ended, on
`stop()`, or when no source, no sink or no engine is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

from streamattn.async_engine import AsyncEngine
from streamattn.engine import Engine, Outcome
from streamattn.errors import ConfigError, ConnectError, ConnectorError, EngineError, FrameError
from streamattn.frame import GAP, Control, Delivery, Fault, Frame, Heartbeat, Message, Result, Sink, Source
from streamattn.metrics import LatencyHistogram

log = logging.getLogger("streamattn")


@dataclass(slots=True)
class RuntimeStats:
    """What a run has done so far. In the end, `frames == answered + dropped.total()`.

    Attributes:
        frames: taken from the sources.
        answered: of these, the ones that are done: answer in every sink, or none wanted.
        dropped: the others, by reason: a reason of `streamattn.scheduler`, the code of the fault that refused it, or
            "undelivered" where the run ended first.
        ignored: messages that are no input, such as somebody's results.
        results, events: answers, and the events they answer.
        faults: sent.
        failed: connectors that failed, with the reason.
        latency: from our receipt of a frame to the end of its step.
    """

    frames: int = 0
    answered: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    ignored: int = 0
    results: int = 0
    events: int = 0
    faults: int = 0
    failed: list[str] = field(default_factory=list)
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)


class _Outgoing(NamedTuple):
    messages: Sequence[Message]
    delivery: Delivery | None  # None: it answers nothing that came in
    dropped: str  # reason, or ""


class Runtime:
    """Joins sources and sinks to an engine, once.

    Args:
        engine: with `auto_open` for topics whose streams are not known beforehand.
        sources, sinks: at least one each; entered and closed here.
        in_flight: messages under way at once, from receipt to the sinks; more wait in the transport.
        drain_seconds: how long a `stop` waits for answers to leave. What is left then is not acknowledged.
        on_progress: called after every answer with the stats.

    Raises:
        ConfigError: impossible arguments.
    """

    def __init__(
        self,
        engine: Engine,
        sources: Sequence[Source],
        sinks: Sequence[Sink],
        *,
        in_flight: int = 4096,
        drain_seconds: float = 10.0,
        on_progress: Callable[[RuntimeStats], None] | None = None,
    ) -> None:
        if not sources or not sinks:
            raise ConfigError(f"runtime: expected a source and a sink, found {len(sources)} and {len(sinks)}")
        if in_flight < 1:
            raise ConfigError(f"in_flight: expected >= 1, found {in_flight}")
        self.engine, self.sources, self.sinks = engine, tuple(sources), tuple(sinks)
        self.in_flight, self.drain_seconds, self.on_progress = in_flight, drain_seconds, on_progress
        self.stats = RuntimeStats()
        self._reading, self._sending = list(sources), list(sinks)  # those that have not failed
        self._outgoing: asyncio.Queue[_Outgoing] = asyncio.Queue()  # bounded by `in_flight`
        self._room = asyncio.Semaphore(in_flight)
        self._stop = asyncio.Event()
        self._started = False
        self._engine_error: Exception | None = None
        self._warned: set[str] = set()

    def stop(self) -> None:
        """Ask a run to stop reading, finish what was accepted, and return. Called on the run's event loop."""
        self._stop.set()

    async def run(self) -> RuntimeStats:
        """Run until the sources end or `stop` is called; return the stats.

        Raises:
            ConnectError: a source or sink could not be set up; the others have been closed again.
            ConnectorError: every source or every sink has failed.
            EngineError: the engine stopped on an internal error.
        """
        if self._started:
            raise ConfigError("runtime: expected to be run once; make a new one")
        self._started = True
        try:
            async with contextlib.AsyncExitStack() as stack:
                for connector in (*self.sinks, *self.sources):  # sinks first: no answer without a way out
                    await _enter(connector)
                    stack.push_async_callback(self._close, connector)
                self._announce()
                async with AsyncEngine(self.engine, capacity=self.in_flight, on_event=self._event) as running:
                    await self._pump(running)
        finally:
            self.stats.dropped.update(self._undelivered())
        if self._engine_error is not None:
            raise self._engine_error
        if not self._reading or not self._sending:
            raise ConnectorError("; ".join(self.stats.failed))
        return self.stats

    async def _pump(self, running: AsyncEngine) -> None:
        read = asyncio.create_task(self._read_all(running), name="streamattn-read")
        send = asyncio.create_task(self._send(), name="streamattn-send")
        stop = asyncio.create_task(self._stop.wait(), name="streamattn-stop")
        try:
            await asyncio.wait({read, send, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not read.done() and not send.done():
                await self._wind_down(running, {read, send})
            for task in (send, read):
                if task.done():
                    task.result()  # raises what went wrong
        finally:
            for task in (read, send, stop):
                task.cancel()
            await asyncio.gather(read, send, stop, return_exceptions=True)

    async def _wind_down(self, running: AsyncEngine, work: set[asyncio.Task[None]]) -> None:
        try:
            async with asyncio.timeout(self.drain_seconds):
                await asyncio.gather(*map(self._close_source, self._reading))  # what was handed out is still answered
                await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            log.error("stopped after %g s with answers under way; they are not acknowledged", self.drain_seconds)
            await running.stop()

    # --- connectors ---

    def _announce(self) -> None:
        for kind, connectors in (("source", self.sources), ("sink", self.sinks)):
            for connector in connectors:
                bound = getattr(connector, "endpoints", ())  # with the port that was taken where none was given
                log.info("%s ready: %s%s", kind, connector.name, f" at {', '.join(bound)}" if bound else "")

    async def _close_source(self, source: Source) -> None:
        try:
            await source.close()
        except Exception as error:
            self._lost(self._reading, source, error)

    async def _close(self, connector: Source | Sink) -> None:
        try:
            await connector.__aexit__(None, None, None)
        except Exception as error:  # the others are to be closed, too
            self._report(connector, error)

    def _lost(self, connectors: list, connector: Source | Sink, error: Exception) -> None:
        if connector in connectors:
            connectors.remove(connector)
            self._report(connector, error)

    def _report(self, connector: Source | Sink, error: Exception) -> None:
        expected = isinstance(error, ConnectorError | OSError)
        log.error("%s failed and is left out: %s", connector.name, error, exc_info=None if expected else error)
        self.stats.failed.append(f"{connector.name}: {error}")

    def _engine_lost(self, error: Exception) -> None:
        if self._engine_error is None:
            log.critical("%s", error)
            self._engine_error = error
        self.stop()

    # --- in ---

    async def _read_all(self, running: AsyncEngine) -> None:
        """Read until all sources have ended, then see out what was accepted."""
        async with asyncio.TaskGroup() as group:
            for source in self._reading:
                group.create_task(self._read(source, running), name=f"streamattn-read-{source.name}")
        await running.drain()
        await self._outgoing.join()

    async def _read(self, source: Source, running: AsyncEngine) -> None:
        try:
            async for deliveries in source.frames():
                for delivery in deliveries:
                    await self._accept(delivery, running)
        except EngineError as error:
            self._engine_lost(error)
        except Exception as error:  # also of a decoder: it ends this source, and no other
            self._lost(self._reading, source, error)

    async def _accept(self, delivery: Delivery, running: AsyncEngine) -> None:
        message = delivery.message
        if not isinstance(message, Frame | Control | Heartbeat):
            self.stats.ignored += 1
            delivery.acknowledge()
            return
        await self._room.acquire()
        self.stats.frames += isinstance(message, Frame)
        await running.offer(message, partial(self._finished, delivery))

    # --- out ---

    def _finished(self, delivery: Delivery, outcome: Outcome) -> None:
        if outcome.reason == "stopped":  # neither answered nor dropped: the transport may bring it again
            if outcome.error is not None:
                self._engine_lost(outcome.error)
            return
        messages = _answers(delivery.message, outcome)
        reason = outcome.reason
        if outcome.error is not None and messages and isinstance(messages[0], Fault):
            self._warn_once(messages[0])
            reason = messages[0].code
        self._outgoing.put_nowait(_Outgoing(messages, delivery, reason))

    def _warn_once(self, fault: Fault) -> None:
        """Log the first fault of each code; more would let a bad client fill the log."""
        level = logging.DEBUG if fault.code in self._warned else logging.WARNING
        self._warned.add(fault.code)
        log.log(level, "stream %r: %s: %s (counted from now on)", fault.stream, fault.code, fault.message)

    def _event(self, outcome: Outcome) -> None:
        log.error("%s", outcome.error)
        self._outgoing.put_nowait(_Outgoing(outcome.messages, None, ""))

    async def _send(self) -> None:
        while True:
            messages, delivery, reason = await self._outgoing.get()
            for message in messages:
                await self._send_one(message)
            if delivery is not None:
                self._settle(delivery, reason)
            if self.on_progress is not None:
                self.on_progress(self.stats)
            self._outgoing.task_done()

    def _settle(self, delivery: Delivery, reason: str) -> None:
        if isinstance(delivery.message, Frame):
            if reason:
                self.stats.dropped[reason] += 1
            else:
                self.stats.answered += 1
        delivery.acknowledge()
        self._room.release()

    async def _send_one(self, message: Message) -> None:
        if isinstance(message, Result):
            self.stats.results += 1
            self.stats.events += message.num_events
            if 0 < message.arrival_ns <= message.end_ns:  # else the source stamped it by another clock, or not at all
                self.stats.latency.record(message.end_ns - message.arrival_ns)
        self.stats.faults += isinstance(message, Fault)
        for sink in list(self._sending):
            try:
                await _hand_over(sink, message)
            except Exception as error:
                self._lost(self._sending, sink, error)
        if not self._sending:
            raise ConnectorError("; ".join(self.stats.failed))

    def _undelivered(self) -> dict[str, int]:
        left = self.stats.frames - self.stats.answered - self.stats.dropped.total()
        return {"undelivered": left} if left else {}


async def _enter(connector: Source | Sink) -> None:
    try:
        await connector.__aenter__()
    except OSError as error:
        raise ConnectError(f"{connector.name}: {error}") from error


def _answers(item: Message, outcome: Outcome) -> Sequence[Message]:
    """Return what the wire says to an item, also where the engine has dropped it without a word."""
    if isinstance(item, Heartbeat):
        return ()  # it asks for nothing; one of a stream that is not open is no error
    if outcome.reason == "stale_epoch" and isinstance(item, Frame):
        text = f"epoch: expected the present one or a higher one, found {item.epoch}; stop the old producer"
        return (Fault(item.stream, 0, "stale_epoch", text),)
    if outcome.reason in ("closed", "failed") and isinstance(item, Control):
        code = "internal" if outcome.reason == "failed" else "unknown_stream"
        return (Fault(item.stream, item.request, code, f"{item.op}: the stream has {outcome.reason} before its turn"),)
    return outcome.messages


async def _hand_over(sink: Sink, message: Message) -> None:
    """Send a message, in parts where it is too large for the wire."""
    try:
        await sink.send(message)
    except FrameError as error:
        for part in _sendable(message, error):
            await _hand_over(sink, part)


def _sendable(message: Message, error: FrameError) -> Sequence[Message]:
    """Return the halves of a result that was refused for its size, or the fault that stands for one that has no form.

    Raises:
        FrameError: `error`, if the message is no result.
    """
    if not isinstance(message, Result):
        raise error
    n = message.num_events
    if error.code != "too_large" or n == 1 or any(len(head) != n for head in message.heads.values()):
        return (Fault(message.stream, 0, "too_large" if error.code == "too_large" else "internal", str(error)),)
    half = n // 2
    first = {name: head[:half] for name, head in message.heads.items()}
    second = {name: head[half:] for name, head in message.heads.items()}
    return (
        replace(message, num_events=half, heads=first),
        replace(
            message,
            sequence=message.sequence + half,
            num_events=n - half,
            heads=second,
            flags=message.flags & ~GAP,
            missing=0,
        ),
    )
