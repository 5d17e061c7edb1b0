"""MQTT 5 at QoS 0 and 1 through aiomqtt, without its defaults that lose data.

A message is acknowledged to the broker when its `Delivery` is, not when it arrives; the session outlives the connection
and the process, so what was not acknowledged comes again; `ReceiveMaximum` keeps the broker from sending more than the
consumer has room for. A duplicate after a reconnect is recognised by its sequence number, as on any transport.
"""

from __future__ import annotations

import asyncio
import functools
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple, Self, cast

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from streamattn.connectors.base import Beats, Decoder, Intake, check_number, deliver, logger, spread
from streamattn.errors import ConfigError, ConnectError, ConnectorError, SendError
from streamattn.frame import MAX_MESSAGE_BYTES, ConnectorStats, Delivery, Message, Sink, Source, decode, encode

_BUDGET = 512  # messages of one wake-up
_ACKS_TOGETHER = 64
_ACK_DELAY = 0.02  # seconds that an acknowledgement waits for others
_TIMEOUT = 5.0  # seconds for an answer of the broker
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds between attempts to reconnect
_MAX_PACKET_BYTES = MAX_MESSAGE_BYTES + (1 << 16)  # payload, topic and properties
_ESCAPES = str.maketrans({"%": "%25", "+": "%2B", "#": "%23"})  # wildcards may not stand in a topic


class MqttSource(Source):
    """Receives what is published on topics.

    Args:
        host: the broker.
        port: its port.
        topics: filters to subscribe to, with the wildcards `+` and `#`.
        qos: 1: nothing is lost as long as the broker keeps the session; 0: what the broker or `receive_maximum`
            drops is lost.
        client_id: name of the session; with QoS 1 it must be the same at every start and unique at the broker.
        receive_maximum: messages that the broker may send before the first is acknowledged (QoS 1); messages that
            wait here, above which the next are dropped and counted (QoS 0).
        session_expiry: seconds that the broker keeps the session, and what arrives for it, while we are away.
        decoder: what reads the payload.

    Retained messages are counted in `stats.bad_messages` and refused: they are old data, sent again at every start.
    """

    def __init__(
        self,
        host: str,
        port: int,
        topics: tuple[str, ...],
        *,
        qos: int = 1,
        client_id: str | None = None,
        receive_maximum: int = 512,
        session_expiry: int = 3600,
        decoder: Decoder = decode,
    ) -> None:
        if not topics:
            raise ConfigError("topic: expected at least one topic filter such as sa/in/#, found none")
        if check_number("qos", qos, 0, 1) and not client_id:
            raise ConfigError("client_id: expected a name that stays the same across restarts (or qos=0), found none")
        self.name = f"mqtt {host}:{port} {','.join(topics)}"
        self.stats = ConnectorStats()
        self._topics = topics
        self._qos = qos
        self._room = check_number("receive_maximum", receive_maximum, 1, 65_535)
        self._intake = Intake(self.name, self.stats, decoder)
        self._waiting: deque[_Arrival] = deque()
        self._ready: list[Delivery] = []
        self._changed = asyncio.Event()
        self._life = 0  # connections so far: a packet id means something within one of them only
        self._acks: list[int] = []
        self._flushing: asyncio.TimerHandle | None = None
        properties = Properties(PacketTypes.CONNECT)
        properties.ReceiveMaximum = receive_maximum
        properties.MaximumPacketSize = _MAX_PACKET_BYTES
        if qos:
            properties.SessionExpiryInterval = check_number("session_expiry", session_expiry, 1, 2**32 - 1)
        make = functools.partial(
            aiomqtt.Client,
            host,
            port,
            identifier=client_id,
            clean_start=not qos,
            properties=properties,
            queue_type=_hook(self._arrived),
        )
        self._connection = _Connection(self.name, self.stats, make, self._connecting, self._subscribe, self._abort)

    async def __aenter__(self) -> Self:
        """Connect and subscribe.

        Raises:
            ConnectError: the broker is not there, or refuses.
        """
        await self._connection.open()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        """Close it."""
        await self.close()

    async def frames(self) -> AsyncIterator[list[Delivery]]:
        """Yield all that has arrived, at most 512 messages at a time, until `close()`."""
        self._connection.check_opened()
        while not self._connection.closed:
            self._connection.check()
            self._decode()
            if self._ready:
                batch, self._ready = self._ready, []
                yield batch
            if self._waiting:
                await asyncio.sleep(0)
            else:
                self._changed.clear()
                await self._changed.wait()

    async def close(self) -> None:
        """End the iteration, hand over the acknowledgements and leave the broker; the session stays."""
        self._flush()
        self._changed.set()
        await self._connection.close()

    def _connecting(self, session_present: bool) -> None:
        self._life += 1
        self._acks.clear()  # of the connection before: the broker sends those messages again
        if session_present:
            self._waiting = deque(arrival for arrival in self._waiting if not arrival.qos)

    async def _subscribe(self, client: aiomqtt.Client) -> None:
        options = SubscribeOptions(qos=self._qos, retainHandling=SubscribeOptions.RETAIN_SEND_IF_NEW_SUB)
        for topic in self._topics:
            codes = await client.subscribe(topic, options=options)
            if any(isinstance(code, ReasonCode) and code.is_failure for code in codes):
                raise aiomqtt.MqttError(f"the broker refuses a subscription to {topic!r}: {codes[0]}")

    def _abort(self) -> None:
        self._changed.set()

    def _arrived(self, message: aiomqtt.Message) -> None:
        arrival = _Arrival(time.monotonic_ns(), message.payload, message.mid, message.qos, self._life)
        if message.retain:
            self._intake.refuse(f"retained message on {message.topic}")
            self._acknowledge(arrival)
        elif not message.qos and len(self._waiting) >= self._room:
            self.stats.dropped += 1
        else:
            self._waiting.append(arrival)
            self._changed.set()

    def _decode(self) -> None:
        for _ in range(min(_BUDGET, len(self._waiting))):
            arrival = self._waiting.popleft()
            message = self._intake.take(arrival.payload, arrival.arrival_ns)
            acknowledge = functools.partial(self._acknowledge, arrival)
            if message is None:
                acknowledge()
            else:
                self._ready.append(deliver(message, acknowledge))

    def _acknowledge(self, arrival: _Arrival) -> None:
        if not arrival.qos or arrival.life != self._life or self._connection.closed:
            return
        self._acks.append(arrival.packet_id)
        if len(self._acks) >= _ACKS_TOGETHER:
            self._flush()
        elif self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_later(_ACK_DELAY, self._flush)

    def _flush(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        acks, self._acks = self._acks, []
        client = self._connection.client
        if client is not None:
            for packet_id in acks:
                _acknowledge(client, packet_id)


class MqttSink(Sink):
    """Publishes messages on `topic + stream`; a wildcard character in a stream's name is written %2B or %23.

    While the broker is away `send` waits. With QoS 1 it returns when the broker has the message, with QoS 0 when it
    has been written to the connection.

    Args:
        host: the broker.
        port: its port.
        topic: put before the stream's name.
        qos: 0 or 1.
        heartbeat: seconds of silence after which a stream's end is announced, again and again; 0 is off.
    """

    def __init__(self, host: str, port: int, topic: str = "", *, qos: int = 1, heartbeat: float = 1.0) -> None:
        if "+" in topic or "#" in topic:
            raise ConfigError(f"topic: expected no wildcards in the topic of a sink, found {topic!r}")
        self.name = f"mqtt {host}:{port} {topic}"
        self.stats = ConnectorStats()
        self._topic = topic
        self._qos = check_number("qos", qos, 0, 1)
        self._beats = Beats(heartbeat)
        self._beating: asyncio.Task[None] | None = None
        make = functools.partial(aiomqtt.Client, host, port, clean_start=True)
        self._connection = _Connection(self.name, self.stats, make, _ignore, _nothing_to_do, lambda: None)

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            ConnectError: the broker is not there, or refuses.
        """
        await self._connection.open()
        if self._beats.interval:
            self._beating = asyncio.create_task(self._beat(), name=f"{self.name} heartbeats")
        return self

    async def __aexit__(self, *exc: Any) -> None:
        """Close it."""
        await self.close()

    async def send(self, message: Message) -> None:
        """Publish a message; wait for the broker. A message that a reconnect caught on the way may arrive twice.

        Raises:
            SendError: the sink is closed.
            FrameError: the message has no wire form.
        """
        data = encode(message)
        await self._publish(message.stream, data)
        self._beats.note(message)
        self.stats.messages += 1
        self.stats.num_bytes += len(data)

    async def close(self) -> None:
        """Announce the end of the streams and leave the broker."""
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait([self._beating])
            if not self._beating.cancelled():
                self._beating.result()
            self._beating = None
        with suppress(TimeoutError, SendError):  # the broker may be away for good
            async with asyncio.timeout(_TIMEOUT):
                async for heartbeat in spread(self._beats.last_words()):
                    await self._publish(heartbeat.stream, encode(heartbeat))
        await self._connection.close()

    async def _publish(self, stream: str, data: bytes) -> None:
        topic = self._topic + stream.translate(_ESCAPES)
        while True:
            client = await self._connection.wait()
            try:
                await client.publish(topic, data, qos=self._qos, timeout=_TIMEOUT)
                return
            except aiomqtt.MqttError as error:
                logger.debug("%s: publishing again: %s", self.name, error)
                await asyncio.sleep(_FIRST_PAUSE)

    async def _beat(self) -> None:
        while True:
            async for heartbeat in spread(await self._beats.idle()):
                await self._publish(heartbeat.stream, encode(heartbeat))


class _Arrival(NamedTuple):
    arrival_ns: int
    payload: bytes
    packet_id: int
    qos: int
    life: int


def _ignore(_session_present: bool) -> None:
    pass


async def _nothing_to_do(_client: aiomqtt.Client) -> None:
    pass


# --- the connection --------------------------------------------------------------------------------------------------


class _Connection:
    """Keeps a client connected: a new one for each connection, with growing, jittered pauses, for ever.

    The first attempt is the caller's to see; after that only `close` ends it.
    """

    def __init__(
        self,
        name: str,
        stats: ConnectorStats,
        make: Callable[..., aiomqtt.Client],
        connecting: Callable[[bool], None],
        connected: Callable[[aiomqtt.Client], Awaitable[None]],
        failed: Callable[[], None],
    ) -> None:
        self.closed = False
        self.client: aiomqtt.Client | None = None
        self._name = name
        self._stats = stats
        self._make = make
        self._connecting = connecting
        self._connected = connected
        self._failed = failed
        self._changed = asyncio.Event()
        self._closing = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    async def open(self) -> None:
        if self._running is not None:
            raise ConnectorError(f"{self._name}: expected to be opened once; make a new one to open it again")
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running = asyncio.create_task(self._run(first), name=self._name)
        self._running.add_done_callback(lambda _: self._failed())
        try:
            await first
        except BaseException:
            await self.close()
            raise

    def check_opened(self) -> None:
        if self._running is None:
            raise ConnectorError(f"{self._name}: expected `async with` around its use, found it not opened")

    def check(self) -> None:
        """Raise what ended the connection's task, if something did."""
        if self._running is not None and self._running.done():
            self._running.result()

    async def wait(self) -> aiomqtt.Client:
        """Return the connected client; wait for it."""
        while not self.closed:
            self.check_opened()
            self.check()
            if self.client is not None:
                return self.client
            self._changed.clear()
            await self._changed.wait()
        raise SendError(f"{self._name}: expected an open sink, found a closed one")

    async def close(self) -> None:
        self.closed = True
        self._closing.set()
        self._changed.set()
        if self._running is not None:
            await asyncio.wait([self._running])

    async def _run(self, first: asyncio.Future[None]) -> None:
        pause = _FIRST_PAUSE
        while not self.closed:
            try:
                async with _Session(self._make, self._connecting) as client:
                    await self._connected(client)
                    self.client = client
                    self._changed.set()
                    pause = _FIRST_PAUSE
                    if not first.done():
                        first.set_result(None)
                    await self._until_lost(client)
            except aiomqtt.MqttError as error:
                if not first.done():
                    first.set_exception(ConnectError(f"{self._name}: {error}; is the broker running there?"))
                    return
                logger.warning("%s: %s; connecting again", self._name, error)
            finally:
                self.client = None
            if not self.closed:
                self._stats.reconnects += 1
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause * random.uniform(0.5, 1.5)):
                        await self._closing.wait()
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _until_lost(self, client: aiomqtt.Client) -> None:
        lost = asyncio.ensure_future(_lost(client))
        closing = asyncio.ensure_future(self._closing.wait())
        await asyncio.wait({lost, closing}, return_when=asyncio.FIRST_COMPLETED)
        closing.cancel()
        lost.cancel()
        await asyncio.wait({lost, closing})
        if not lost.cancelled():
            lost.result()


async def _lost(client: aiomqtt.Client) -> None:
    async for _ in client.messages:  # the hook takes them all; this ends with the connection
        pass


# --- the parts of aiomqtt 2.5 and paho 2 that are not public ---------------------------------------------------------


class _Session:
    """A connected client whose messages are acknowledged by hand, and of which nothing is left afterwards."""

    def __init__(self, make: Callable[..., aiomqtt.Client], connecting: Callable[[bool], None]) -> None:
        self._client = make(protocol=aiomqtt.ProtocolVersion.V5, timeout=_TIMEOUT)
        self._client.pending_calls_threshold = 1 << 16  # it would log a warning for each concurrent `send`
        paho = self._client._client
        paho.manual_ack_set(True)
        on_connect: Any = paho.on_connect

        def note_session(client: Any, userdata: Any, flags: Any, reason_code: Any, properties: Any = None) -> None:
            connecting(flags.session_present)
            on_connect(client, userdata, flags, reason_code, properties)

        paho.on_connect = note_session

    async def __aenter__(self) -> aiomqtt.Client:
        try:
            return await self._client.__aenter__()
        except BaseException:
            self._abandon()
            raise

    async def __aexit__(self, *exc: Any) -> None:
        try:
            await self._client.__aexit__(*exc)
        finally:
            self._abandon()

    def _abandon(self) -> None:
        """Close the socket that aiomqtt leaves open where the broker accepted it and then said nothing."""
        self._client._client._sock_close()


def _acknowledge(client: aiomqtt.Client, packet_id: int) -> None:
    client._client.ack(packet_id, 1)


def _hook(arrived: Callable[[aiomqtt.Message], None]) -> type[asyncio.Queue[aiomqtt.Message]]:
    """Return a "queue" that hands each message on at once: no task and no second queue for each."""

    class Handoff(asyncio.Queue):
        def put_nowait(self, item: aiomqtt.Message) -> None:
            arrived(item)

    return cast("type[asyncio.Queue[aiomqtt.Message]]", Handoff)
