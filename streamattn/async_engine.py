"""AsyncEngine: an Engine on its own thread, for asyncio.

The thread owns the engine and with it the device; the event loop only moves items in and outcomes out. Two bounded
hand-overs, one a direction: `offer` waits while too many items are under way, and that is the backpressure that reaches
a source. Outcomes come back to the loop in one call per step.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Self, TypeVar

from streamattn.batch import Admission
from streamattn.engine import Engine, Outcome, new_frame
from streamattn.errors import EngineError, FrameError, OverloadError, StreamattnError, StreamError
from streamattn.frame import Answer, Control, Fault, Frame, Heartbeat, Reply, Result

Item = Frame | Control | Heartbeat
Finished = Callable[[Outcome], None]
T = TypeVar("T")


class _Ticket:
    """One item under way; its identity is the engine's tag."""

    __slots__ = ("finished", "item")

    def __init__(self, item: Item, finished: Finished) -> None:
        self.item, self.finished = item, finished


class AsyncEngine:
    """Runs an Engine on a thread of its own. Use as `async with AsyncEngine(engine) as running:`.

    Leaving the block drains what was accepted, then stops the thread; nothing is left behind.

    Args:
        engine: not used by anyone else from now on.
        capacity: items under way at once, from `offer` to outcome.
        on_event: called on the loop with outcomes that belong to no offered item: faults of whole streams.
    """

    def __init__(self, engine: Engine, *, capacity: int = 4096, on_event: Finished | None = None) -> None:
        self.engine, self.capacity = engine, capacity
        self.on_event = on_event
        self._inbox: deque[_Ticket] = deque()
        self._calls: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._under_way: set[_Ticket] = set()  # touched by the loop only
        self._room = asyncio.Event()
        self._idle = asyncio.Event()
        self._stopped = asyncio.Event()

    # --- life ---

    async def __aenter__(self) -> Self:
        if self._thread is not None:
            raise EngineError("AsyncEngine: expected to be entered once; make a new one")
        self._loop = asyncio.get_running_loop()
        self._room.set()
        self._idle.set()
        self._thread = threading.Thread(target=self._work, name="streamattn-engine", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        if exc[0] is None:
            await self.drain()
        await self.stop()

    async def drain(self) -> None:
        """Return when everything that was offered has its outcome."""
        await self._idle.wait()

    async def stop(self) -> None:
        """Stop the thread after the step it is in. Items without an outcome get one with the reason "stopped"."""
        thread = self._thread
        if thread is None:
            return
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await self._stopped.wait()
        thread.join()  # it has nothing left to do

    # --- items ---

    async def offer(self, item: Item, finished: Finished) -> None:
        """Hand an item over; `finished(outcome)` is called on the loop, exactly once. Waits while there is no room.

        Raises:
            EngineError: the engine is stopped.
        """
        while len(self._under_way) >= self.capacity:
            self._room.clear()
            await self._room.wait()
        if self._stopping or self._thread is None:
            raise EngineError("AsyncEngine: is stopped")
        ticket = _Ticket(item, finished)
        self._under_way.add(ticket)
        self._idle.clear()
        with self._wake:
            self._inbox.append(ticket)
            self._wake.notify()

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function on the engine's thread between two steps and return its value."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._wake:
            if self._stopping or self._thread is None:
                raise EngineError("AsyncEngine: is stopped")
            self._calls.append((function, future))
            self._wake.notify()
        return await future

    async def open(self, stream: str) -> AsyncStream:
        """Reserve a lane for a new stream.

        Raises:
            OverloadError: no lane is free.
            ConfigError: the stream is open already.
        """
        await self.call(lambda: self.engine.open(stream))
        return AsyncStream(self, stream)

    # --- the engine's thread ---

    def _work(self) -> None:
        error: EngineError | None = None
        try:
            self._serve()
        except BaseException as failure:  # a broken invariant: nothing more can be promised, but nobody may hang
            error = EngineError(f"the engine stopped on an internal error: {failure!r}")
            error.__cause__ = failure
        finally:
            with self._wake:
                self._stopping = True
                calls, self._calls = self._calls, deque()
            for _, future in calls:
                self._post(_set_error, future, error or EngineError("AsyncEngine: is stopped"))
            self._post(self._abandon, error)
            self._post(self._stopped.set)

    def _serve(self) -> None:
        held: dict[str, deque[_Ticket]] = {}  # items of streams whose queue is full, in order
        while True:
            with self._wake:
                while not (self._inbox or self._calls or self._stopping or held or self.engine.busy):
                    self._wake.wait()
                if self._stopping:
                    return
                arrived, self._inbox = self._inbox, deque()
                calls, self._calls = self._calls, deque()
            for function, future in calls:
                self._answer_call(function, future)
            finished = self._admit(held, arrived)
            finished += self.engine.step()
            if finished:
                self._post(self._deliver, finished)

    def _admit(self, held: dict[str, deque[_Ticket]], arrived: deque[_Ticket]) -> list[Outcome]:
        refused: list[Outcome] = []
        for stream in list(held):  # first what had to wait: the order of a stream is kept
            queue = held[stream]
            while queue and self._try(queue[0], refused):
                queue.popleft()
            if not queue:
                del held[stream]
        for ticket in arrived:
            stream = ticket.item.stream
            if stream in held or not self._try(ticket, refused):
                held.setdefault(stream, deque()).append(ticket)
        return refused

    def _try(self, ticket: _Ticket, refused: list[Outcome]) -> bool:
        """Offer one item; return False if its stream's queue is full."""
        item = ticket.item
        try:
            admission = self.engine.offer(item, ticket)
        except StreamattnError as error:
            request = item.request if isinstance(item, Control) else 0
            fault = Fault(item.stream, request, _code(error), str(error)[:512])
            refused.append(Outcome(ticket, (fault,), "refused", error))
            return True
        if isinstance(item, Heartbeat):
            refused.append(Outcome(ticket))
        return admission is not Admission.BLOCKED

    def _answer_call(self, function: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        try:
            value = function()
        except Exception as error:  # it belongs to the caller
            self._post(_set_error, future, error)
        else:
            self._post(_set_value, future, value)

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function, *arguments)

    # --- back on the loop ---

    def _deliver(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            ticket = outcome.tag
            if isinstance(ticket, _Ticket):
                self._under_way.discard(ticket)
                ticket.finished(outcome)
            elif self.on_event is not None:
                self.on_event(outcome)
        if len(self._under_way) < self.capacity:
            self._room.set()
        if not self._under_way:
            self._idle.set()

    def _abandon(self, error: EngineError | None) -> None:
        self._deliver([Outcome(ticket, reason="stopped", error=error) for ticket in list(self._under_way)])


class AsyncStream:
    """One open stream of an AsyncEngine. The async twin of `streamattn.engine.Stream`."""

    def __init__(self, engine: AsyncEngine, name: str) -> None:
        self.engine, self.name = engine, name
        self.sequence = 0
        self._request = 0

    async def push(
        self,
        ids: Any = None,
        features: Any = None,
        *,
        event_ns: int = 0,
        answer: Answer = "each",
        deadline_ns: int | None = None,
    ) -> Result:
        """Append events and return their answer; arguments and errors as `Stream.push`."""
        clock = self.engine.engine.clock
        frame = new_frame(self.name, self.sequence, ids, features, event_ns, answer, clock(), deadline_ns)
        self.engine.engine.check_input(frame)  # before it gets a number: a refused frame leaves no gap
        self.sequence += len(frame)
        outcome = await self._await(frame)
        if outcome.reason:
            raise StreamError(self.name, f"the frame was dropped: {outcome.reason}")
        if not outcome.messages:
            return Result(self.name, 0, frame.sequence, len(frame), event_ns, frame.arrival_ns, 0, 0)
        result = outcome.messages[0]
        assert isinstance(result, Result)
        return result

    async def mark(self) -> int:
        """Remember the present state, in order with what was pushed; return the mark's number."""
        return await self._command("mark")

    async def rollback(self, mark: int) -> None:
        """Return to the state at `mark`; sequence numbers go on."""
        await self._command("rollback", mark)

    async def reset(self) -> None:
        """Forget everything; sequence numbers go on."""
        await self._command("reset")

    async def close(self) -> None:
        """Free the lane and its marks."""
        await self._command("close")

    async def _command(self, op: Any, value: int = 0) -> int:
        self._request += 1
        outcome = await self._await(Control(self.name, 0, op, self._request, value))
        if outcome.reason:
            raise StreamError(self.name, f"{op} was dropped: {outcome.reason}")
        reply = outcome.messages[0]
        assert isinstance(reply, Reply)
        return reply.value

    async def _await(self, item: Item) -> Outcome:
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        await self.engine.offer(item, lambda outcome: _set_value(future, outcome))
        outcome = await future
        if outcome.error is not None:
            raise outcome.error
        return outcome


def _code(error: StreamattnError) -> str:
    if isinstance(error, FrameError):
        return error.code
    return "overloaded" if isinstance(error, OverloadError) else "unknown_stream"


def _set_value(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


def _set_error(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
