"""ZeroMQ: SUB and PULL sources, PUB and PUSH sinks.

What libzmq does by itself (reconnecting, queues of messages) stays with it. What it hides is made visible here: broken
connections are counted from the socket monitor, oversized messages end a connection instead of the memory, and the
loss that PUB never reports shows as a gap in the sequence numbers, for the last messages of a stream by heartbeats.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import re
import struct
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

import zmq
import zmq.auth
from zmq.utils import z85

from streamattn.connectors.base import Beats, Decoder, Intake, check_number, deliver, logger, spread
from streamattn.errors import ConfigError, ConnectError, ConnectorError, SendError
from streamattn.frame import MAX_MESSAGE_BYTES, ConnectorStats, Delivery, Heartbeat, Message, Sink, Source, decode
from streamattn.frame import encode as encode_message

_BUDGET = 512  # messages of one wake-up, after which other tasks get their turn
_MAX_PARTS = 2  # topic and payload
_RECONNECT_MS = 100  # first pause before reconnecting; libzmq doubles it
_MAX_RECONNECT_MS = 5_000
_TCP_KEEPALIVE = 5  # seconds of silence, then seconds between probes
_HANDSHAKE_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_ADVICE = {
    errno.EADDRINUSE: "another process has it: stop that one or choose another port",
    errno.EADDRNOTAVAIL: "no interface of this machine has that address: bind 127.0.0.1 or one of its own",
    errno.ENODEV: "no such interface: give an IP address of this machine, or * for all",
    errno.EINVAL: "expected tcp://host:port, ipc://path or inproc://name",
    errno.EPROTONOSUPPORT: "expected tcp://host:port, ipc://path or inproc://name",
    errno.EACCES: "not permitted: ports below 1024 belong to root, and a socket's folder must be writable",
    errno.ENOENT: "the socket's folder does not exist",
}


class ZmqSource(Source):
    """Receives messages on a SUB or PULL socket, one part (payload) or two (topic, payload) each.

    Args:
        pattern: "sub", where the publisher drops what we are too slow for, or "pull", where it waits for us.
        endpoints: libzmq addresses, `tcp://host:port`, `ipc://path` or `inproc://name`.
        bind: listen on the endpoints instead of connecting to them. Port 0 takes a free one, see `endpoints`.
        topic: prefixes to subscribe to; several are allowed; "sub" only.
        hwm: messages queued for each peer inside libzmq, on top of the kernel's buffers.
        max_message_bytes: a larger part ends the connection of its sender, seen in `stats.reconnects`.
        ping: seconds between libzmq's own heartbeats; 0, the default, is off: see `docs/connectors.md`.
        insecure: bind an address off this machine without CURVE.
        curve_key: file with our secret key, as `zmq.auth.create_certificates` writes it.
        curve_secret: the secret key itself, 40 characters of Z85.
        curve_server: public key of the binding side, Z85 or the path of its file; for the connecting side.
        curve_clients: folder of the public keys that may connect; for the binding side. Without it anyone may who
            knows our public key.
        decoder: what reads the payload.
    """

    def __init__(
        self,
        pattern: Literal["sub", "pull"],
        endpoints: Sequence[str],
        *,
        bind: bool = False,
        topic: tuple[str, ...] = (),
        hwm: int = 1000,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        ping: float = 0.0,
        insecure: bool = False,
        curve_key: Path | None = None,
        curve_secret: bytes | None = None,
        curve_server: str | None = None,
        curve_clients: Path | None = None,
        decoder: Decoder = decode,
    ) -> None:
        if pattern == "pull" and topic:
            raise ConfigError(f"topic: expected with zmq+sub only, found {topic} with zmq+pull")
        self.name = f"zmq+{pattern} {','.join(endpoints)}"
        self.stats = ConnectorStats()
        self._intake = Intake(self.name, self.stats, decoder)
        self._topics = topic or ("",)
        check_number("max_message_bytes", max_message_bytes, 1, 1 << 30)
        curve = _Curve(bind, curve_key, curve_secret, curve_server, curve_clients)
        kind = zmq.SUB if pattern == "sub" else zmq.PULL
        self._link = _Link(self.name, self.stats, kind, endpoints, bind, curve, insecure)
        self._link.set(zmq.RCVHWM, check_number("hwm", hwm, 1, 1_000_000))
        self._link.set(zmq.MAXMSGSIZE, max_message_bytes)
        self._link.set_ping(ping)
        self._ready: list[Delivery] = []

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The addresses in use; after binding port 0, the port that was taken."""
        return self._link.endpoints

    async def __aenter__(self) -> Self:
        """Bind or connect.

        Raises:
            ConnectError: an address is in use, or cannot be used.
        """
        self._link.open()
        if self._link.kind == zmq.SUB:
            for topic in self._topics:
                self._link.socket.setsockopt(zmq.SUBSCRIBE, topic.encode())
        return self

    async def __aexit__(self, *exc: Any) -> None:
        """Close it."""
        await self.close()

    async def frames(self) -> AsyncIterator[list[Delivery]]:
        """Yield all that has arrived, at most 512 messages at a time, until `close()`."""
        while await self._link.wait(zmq.POLLIN):
            self._drain()
            if self._ready:
                batch, self._ready = self._ready, []
                yield batch

    async def close(self) -> None:
        """End the iteration and close the socket."""
        await self._link.close(linger_ms=0)

    def _drain(self) -> None:
        arrival_ns = time.monotonic_ns()
        take, ready = self._intake.take, self._ready
        with suppress(zmq.Again):
            for _ in range(_BUDGET):
                data = self._receive()
                message = None if data is None else take(data, arrival_ns)
                if message is not None:
                    ready.append(deliver(message))

    def _receive(self) -> bytes | None:
        socket = self._link.socket
        data = socket.recv(zmq.NOBLOCK)
        parts = 1
        while socket.getsockopt(zmq.RCVMORE):
            data = socket.recv(zmq.NOBLOCK)
            parts += 1
        if parts > _MAX_PARTS:
            self._intake.refuse(f"expected a topic and a payload, found {parts} parts")
            return None
        return data


class ZmqSink(Sink):
    """Sends messages on a PUB or PUSH socket: results of an engine, or the frames of a producer.

    PUB sends (topic + stream, payload) and never waits: what a slow or absent subscriber misses is lost, and libzmq
    does not say so. PUSH sends the payload alone and waits while every peer's queue is full.

    Args:
        pattern: "pub" or "push".
        topic: put before the stream's name; "pub" only.
        hwm: messages queued for each peer.
        heartbeat: seconds of silence after which a stream's end is announced, again and again; 0 is off.
        linger: seconds that `close` gives the queued messages to leave.
        endpoints, bind, ping, insecure, curve_key, curve_secret, curve_server, curve_clients: see `ZmqSource`.
    """

    def __init__(
        self,
        pattern: Literal["pub", "push"],
        endpoints: Sequence[str],
        *,
        bind: bool = False,
        topic: str = "",
        hwm: int = 1000,
        heartbeat: float = 1.0,
        linger: float = 1.0,
        ping: float = 0.0,
        insecure: bool = False,
        curve_key: Path | None = None,
        curve_secret: bytes | None = None,
        curve_server: str | None = None,
        curve_clients: Path | None = None,
    ) -> None:
        if pattern == "push" and topic:
            raise ConfigError(f"topic: expected with zmq+pub only, found {topic!r} with zmq+push")
        self.name = f"zmq+{pattern} {','.join(endpoints)}"
        self.stats = ConnectorStats()
        curve = _Curve(bind, curve_key, curve_secret, curve_server, curve_clients)
        kind = zmq.PUB if pattern == "pub" else zmq.PUSH
        self._link = _Link(self.name, self.stats, kind, endpoints, bind, curve, insecure)
        self._link.set(zmq.SNDHWM, check_number("hwm", hwm, 1, 1_000_000))
        self._link.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._link.set_ping(ping)
        self._topic = topic
        self._linger_ms = round(1000 * check_number("linger", linger, 0, 3600))
        self._beats = Beats(heartbeat)
        self._beating: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()  # senders that wait are served in order

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The addresses in use; after binding port 0, the port that was taken."""
        return self._link.endpoints

    async def __aenter__(self) -> Self:
        """Bind or connect.

        Raises:
            ConnectError: an address is in use, or cannot be used.
        """
        self._link.open()
        if self._beats.interval:
            self._beating = asyncio.create_task(self._beat(), name=f"{self.name} heartbeats")
        return self

    async def __aexit__(self, *exc: Any) -> None:
        """Close it."""
        await self.close()

    async def send(self, message: Message) -> None:
        """Hand a message to libzmq; PUSH waits while there is no room. Cancelled while it waits, nothing is sent.

        Raises:
            SendError: the sink is closed.
            FrameError: the message has no wire form.
        """
        data = encode_message(message)
        async with self._turn:
            while not self._try_send(message.stream, data):
                await self._link.wait(zmq.POLLOUT)
        self._beats.note(message)
        self.stats.messages += 1
        self.stats.num_bytes += len(data)

    async def close(self) -> None:
        """Announce the end of the streams, give the queue `linger` seconds to leave, and close the socket."""
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait([self._beating])
            if not self._beating.cancelled():
                self._beating.result()
            self._beating = None
        if not self._link.closed:
            async for heartbeat in spread(self._beats.last_words()):
                self._send_beat(heartbeat)
        await self._link.close(self._linger_ms)

    def _try_send(self, stream: str, data: bytes) -> bool:
        if self._link.closed:
            raise SendError(f"{self.name}: expected an open sink, found a closed one")
        socket = self._link.socket
        try:
            if self._link.kind == zmq.PUB:
                socket.send((self._topic + stream).encode(), zmq.NOBLOCK | zmq.SNDMORE)
            socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        finally:
            self._link.touched()
        return True

    async def _beat(self) -> None:
        while True:
            async for heartbeat in spread(await self._beats.idle()):
                self._send_beat(heartbeat)

    def _send_beat(self, heartbeat: Heartbeat) -> None:
        # Where there is no room the peer is busy with older messages: the next beat will do.
        self._try_send(heartbeat.stream, encode_message(heartbeat))


# --- the socket ------------------------------------------------------------------------------------------------------


class _Link:
    """A socket, its context, its monitor, and its readiness on the event loop.

    Every link has a context of its own, so that closing it can wait for exactly its messages and leaves no thread; only
    `inproc` needs the context of the process.
    """

    def __init__(
        self,
        name: str,
        stats: ConnectorStats,
        kind: int,
        endpoints: Sequence[str],
        bind: bool,
        curve: _Curve,
        insecure: bool,
    ) -> None:
        self.kind = kind
        self.endpoints = _check_endpoints(endpoints)
        self.closed = False
        self._name = name
        self._stats = stats
        self._bind = bind
        self._curve = curve
        self._options: dict[int, int] = {zmq.LINGER: 0}
        self._opened = False
        self._context: zmq.Context | None = None
        self._monitor: zmq.Socket | None = None
        self._gate: _Gate | None = None
        self._wake = asyncio.Event()
        self._warned = False
        if bind and not curve.active and not insecure:
            for endpoint in self.endpoints:
                _check_local(endpoint)

    def set(self, option: int, value: int) -> None:
        """Set a socket option, before `open`."""
        self._options[option] = value

    def set_ping(self, seconds: float) -> None:
        """Turn on libzmq's heartbeats: a peer that is silent for two intervals is disconnected."""
        if check_number("ping", seconds, 0, 3600):
            self.set(zmq.HEARTBEAT_IVL, round(1000 * seconds))
            self.set(zmq.HEARTBEAT_TIMEOUT, round(2000 * seconds))

    def open(self) -> None:
        """Make the socket and bind or connect it."""
        if self._opened:
            raise ConnectorError(f"{self._name}: expected to be opened once; make a new one to open it again")
        self._opened = True
        shared = self.endpoints[0].startswith("inproc://")
        if shared and self._curve.active:
            raise ConfigError("curve_key: expected with tcp:// or ipc://, found with inproc://")
        self._context = None if shared else zmq.Context()
        self.socket = (self._context or zmq.Context.instance()).socket(self.kind)
        try:
            self._set_options()
            self._watch()
            self.endpoints = tuple(map(self._attach, self.endpoints))
        except BaseException:
            self._close_sockets(0)
            self._end_context()
            raise

    async def wait(self, event: int) -> bool:
        """Wait until the socket can be read (POLLIN) or written (POLLOUT); False once the link is closed.

        It always lets other tasks run, so that a busy socket does not starve them.
        """
        if not self._opened:
            raise ConnectorError(f"{self._name}: expected `async with` around its use, found it not opened")
        if self.closed:
            return False
        await asyncio.sleep(0)
        while not self.closed and not self._events() & event:
            self._wake.clear()
            await self._wake.wait()
        return not self.closed

    def _events(self) -> int:
        events = self.socket.getsockopt(zmq.EVENTS)
        assert isinstance(events, int)
        return events

    def touched(self) -> None:
        """Wake whoever waits: any call on the socket can swallow the edge that its descriptor had to report."""
        self._wake.set()

    async def close(self, linger_ms: int) -> None:
        """Close the socket; wait at most `linger_ms` for its queue to leave."""
        if self.closed:
            return
        self.closed = True
        self._wake.set()
        if not self._opened:
            return
        self._close_sockets(linger_ms)
        if linger_ms:
            await asyncio.to_thread(self._end_context)
        else:
            self._end_context()

    def _set_options(self) -> None:
        self.socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, _MAX_RECONNECT_MS)
        self.socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self.socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _TCP_KEEPALIVE)
        self.socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, _TCP_KEEPALIVE)
        self.socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
        if any("[" in endpoint for endpoint in self.endpoints):
            self.socket.setsockopt(zmq.IPV6, 1)
        for option, value in self._options.items():
            self.socket.setsockopt(option, value)
        self._gate = self._curve.apply(self.socket)

    def _attach(self, endpoint: str) -> str:
        try:
            if not self._bind:
                self.socket.connect(endpoint)
                return endpoint
            self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            verb = "bind" if self._bind else "connect to"
            advice = _ADVICE.get(error.errno or 0, "check the address")
            raise ConnectError(f"{self._name}: cannot {verb} {endpoint}: {error}; {advice}") from None
        path = endpoint.removeprefix("ipc://")
        if path != endpoint and not path.startswith("@"):
            os.chmod(path, 0o600)
        return self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _watch(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._monitor = monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | _HANDSHAKE_FAILURES)
        self._loop.add_reader(_descriptor(self.socket), self._on_ready)
        self._loop.add_reader(_descriptor(monitor), self._on_monitor)
        self._on_monitor()  # a pipe that was never found empty does not signal its first message

    def _on_ready(self) -> None:
        self._events()  # the descriptor is edge triggered: this arms it again
        self._wake.set()

    def _on_monitor(self) -> None:
        assert self._monitor is not None
        with suppress(zmq.Again):
            while True:
                header, endpoint = self._monitor.recv_multipart(zmq.NOBLOCK)
                event, value = struct.unpack("=HI", header)
                if event == zmq.EVENT_MONITOR_STOPPED:
                    return
                if event == zmq.EVENT_DISCONNECTED:
                    self._stats.reconnects += 1
                    logger.info("%s: a connection of %s ended", self._name, endpoint.decode())
                else:
                    self._refused(event, value, endpoint.decode())

    def _refused(self, event: int, value: int, endpoint: str) -> None:
        if not self._warned:  # it happens again at every attempt
            what = str(zmq.Event(event).name).removeprefix("HANDSHAKE_FAILED_").lower()
            logger.warning(
                "%s: a handshake of %s failed (%s %d): check the CURVE keys of both sides",
                self._name,
                endpoint,
                what,
                value,
            )
        self._warned = True

    def _close_sockets(self, linger_ms: int) -> None:
        if self._monitor is not None:
            self._loop.remove_reader(_descriptor(self.socket))
            self._loop.remove_reader(_descriptor(self._monitor))
            self.socket.disable_monitor()
            self._monitor.close(0)
        if self._gate is not None:
            self._gate.close()
        self.socket.close(linger_ms)

    def _end_context(self) -> None:
        if self._context is not None:
            self._context.term()


def _descriptor(socket: zmq.Socket) -> int:
    descriptor = socket.getsockopt(zmq.FD)
    assert isinstance(descriptor, int)
    return descriptor


def _check_endpoints(endpoints: Sequence[str]) -> tuple[str, ...]:
    if not endpoints:
        raise ConfigError("endpoints: expected at least one address such as tcp://127.0.0.1:5555, found none")
    if len({endpoint.startswith("inproc://") for endpoint in endpoints}) > 1:
        raise ConfigError(f"endpoints: expected inproc:// alone, found it among others in {', '.join(endpoints)}")
    for endpoint in endpoints:
        port = endpoint.rpartition(":")[2]
        if endpoint.startswith("tcp://") and port.isdecimal() and int(port) > 65_535:
            raise ConfigError(f"endpoints: expected a port of at most 65535, found {endpoint}")  # libzmq would wrap it
    return tuple(re.sub(r"^(tcp://.*):0$", r"\1:*", endpoint) for endpoint in endpoints)


def _check_local(endpoint: str) -> None:
    if not endpoint.startswith("tcp://"):
        return
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    with suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    if host not in ("localhost", "lo"):
        raise ConfigError(
            f"endpoints: expected a loopback address, found {endpoint} without CURVE: anyone who reaches it could feed"
            " or read the streams. Give curve_key, or insecure=1 on a network that you trust"
        )


# --- CURVE -----------------------------------------------------------------------------------------------------------


class _Curve:
    """Keys of one side: the binding side is CURVE's server, the connecting side its client."""

    def __init__(
        self, bind: bool, key: Path | None, secret: bytes | None, server: str | None, clients: Path | None
    ) -> None:
        if key is not None and secret is not None:
            raise ConfigError("curve_key: expected either a file or curve_secret, found both")
        own = key is not None or secret is not None
        if bind and server is not None:
            raise ConfigError("curve_server: expected on the connecting side, found with bind")
        if bind and clients is not None and not own:
            raise ConfigError("curve_clients: expected together with curve_key or curve_secret, found alone")
        if not bind and clients is not None:
            raise ConfigError("curve_clients: expected on the binding side, found without bind")
        if not bind and own and server is None:
            raise ConfigError("curve_server: expected the public key of the binding side, found none")
        self.active = own or server is not None
        self._server = None if server is None else _public_key(server)
        self._clients = None if clients is None else _public_keys(clients)
        if key is not None:
            secret = _secret_key(key)
        if secret is None:
            self._public, self._secret = zmq.curve_keypair()
        else:
            self._public, self._secret = _public_of(secret), secret

    def apply(self, socket: zmq.Socket) -> _Gate | None:
        """Set the keys on a socket; with a list of clients, also return the gate that checks them."""
        if not self.active:
            return None
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._secret)
        if self._server is not None:
            socket.setsockopt(zmq.CURVE_SERVERKEY, self._server)
            return None
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        return None if self._clients is None else _Gate(socket.context, self._clients)


class _Gate:
    """Answers libzmq's question (the ZAP protocol, RFC 27) whether the key of a connecting client is a known one."""

    def __init__(self, context: zmq.Context, clients: frozenset[bytes]) -> None:
        self._clients = clients
        self._socket = context.socket(zmq.REP)
        self._socket.bind("inproc://zeromq.zap.01")
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(_descriptor(self._socket), self._answer)

    def close(self) -> None:
        self._loop.remove_reader(_descriptor(self._socket))
        self._socket.close(0)

    def _answer(self) -> None:
        with suppress(zmq.Again):
            while True:
                version, request, _domain, _address, _identity, mechanism, *credentials = self._socket.recv_multipart(
                    zmq.NOBLOCK
                )
                known = mechanism == b"CURVE" and len(credentials) == 1 and credentials[0] in self._clients
                status = (b"200", b"OK") if known else (b"400", b"unknown key")
                self._socket.send_multipart([version, request, *status, b"", b""])


def _secret_key(path: Path) -> bytes:
    secret = _certificate(path)[1]
    if secret is None:
        raise ConfigError(f"curve_key: expected a file with a secret key, found only a public one in {path}")
    return secret


def _public_of(secret: bytes) -> bytes:
    try:
        return zmq.curve_public(secret)
    except (zmq.ZMQError, ValueError):
        raise ConfigError("curve_secret: expected a key of 40 characters of Z85, found something else") from None


def _public_key(text: str) -> bytes:
    key = text.encode() if len(text) == 40 and not Path(text).exists() else _certificate(Path(text))[0]
    _decode_key(key, "curve_server")
    return key


def _public_keys(folder: Path) -> frozenset[bytes]:
    paths = sorted(folder.glob("*.key"))
    if not paths:
        raise ConfigError(f"curve_clients: expected a folder with *.key files, found none in {folder}")
    return frozenset(_decode_key(_certificate(path)[0], str(path)) for path in paths)


def _decode_key(key: bytes, name: str) -> bytes:
    try:
        decoded = z85.decode(key)
    except (ValueError, KeyError, struct.error):
        decoded = b""
    if len(decoded) != 32:
        raise ConfigError(f"{name}: expected a key of 40 characters of Z85, found something else")
    return decoded


def _certificate(path: Path) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a CURVE key file: {error}") from None
