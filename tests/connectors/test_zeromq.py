from __future__ import annotations

import asyncio
import stat
from itertools import pairwise
from pathlib import Path

import pytest
import zmq
import zmq.auth
from helpers_connectors import SubRig, collect, eventually, frame, frames, free_port, sequences, settled

from streamattn.connectors import open_sink, open_source
from streamattn.connectors.zeromq import ZmqSink, ZmqSource
from streamattn.errors import ConfigError, ConnectError, SendError
from streamattn.frame import MAX_MESSAGE_BYTES, Control, Frame, Heartbeat, Message, Result, encode

LOCAL = "tcp://127.0.0.1:0"


async def received(source: ZmqSource, stop) -> list[Message]:
    """Messages up to and including the first for which `stop` holds."""
    found: list[Message] = []
    async with asyncio.timeout(15):
        async for batch in source.frames():
            found += [delivery.message for delivery in batch]
            if any(stop(message) for message in found):
                break
    return found


async def test_a_subscription_is_a_prefix_of_the_topic(tmp_path: Path) -> None:
    rig = SubRig(tmp_path)
    topics = ("sa/in/a", "sa/in/sync")
    async with (
        ZmqSource("sub", [rig.endpoint], topic=topics) as source,
        ZmqSink("pub", [rig.endpoint], bind=True, topic="sa/in/", heartbeat=0) as sink,
    ):
        await rig.joined(source, sink)
        for i in range(5):
            for stream in ("b", "a", "ab"):
                await sink.send(frame(stream, i))
        await sink.send(frame("a", 5))
        found = await collect(source, 11)
    assert sequences(found) == {"a": [0, 1, 2, 3, 4, 5], "ab": [0, 1, 2, 3, 4]}


async def test_loss_on_a_slow_subscriber_shows_as_a_gap(tmp_path: Path) -> None:
    rig = SubRig(tmp_path)
    count = 6_000
    async with (
        ZmqSource("sub", [rig.endpoint], hwm=10) as source,
        ZmqSink("pub", [rig.endpoint], bind=True, hwm=10, heartbeat=0) as sink,
    ):
        await rig.joined(source, sink)
        for i in range(count):  # 96 MB while nobody reads
            await sink.send(frame("s", i * 4_000, 4_000))
        last = frame("s", count * 4_000)

        async def mark() -> None:
            while True:  # there is room for it as soon as somebody reads
                await sink.send(last)
                await asyncio.sleep(0.01)

        marking = asyncio.create_task(mark())
        found = await received(source, lambda m: isinstance(m, Frame) and m.sequence == last.sequence)
        marking.cancel()
    numbers = [m.sequence for m in found if isinstance(m, Frame)]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) < count
    assert any(later - earlier > 4_000 for earlier, later in pairwise(numbers))


async def _ready(source: ZmqSource) -> list[Message]:
    async for batch in source.frames():
        return [delivery.message for delivery in batch]
    return []


@pytest.mark.parametrize("message", [frame("s", 40, 3), Result("s", 7, 40, 3, 0, 0, 0, 0)])
async def test_a_heartbeat_shows_the_loss_of_the_last_messages(tmp_path: Path, message: Frame | Result) -> None:
    rig = SubRig(tmp_path)
    async with ZmqSink("pub", [rig.endpoint], bind=True, heartbeat=0.05) as sink:
        await sink.send(message)  # nobody is there
        async with ZmqSource("sub", [rig.endpoint]) as source:
            found = await received(source, lambda m: isinstance(m, Heartbeat))
    (beat,) = [m for m in found if isinstance(m, Heartbeat)][:1]
    assert (beat.stream, beat.epoch, beat.next_sequence) == ("s", message.epoch, 43)


async def test_a_busy_or_closed_stream_has_no_heartbeats() -> None:
    async with ZmqSource("pull", [LOCAL], bind=True) as source:
        async with ZmqSink("push", source.endpoints, heartbeat=0.03, linger=5) as sink:
            await sink.send(frame("closed", 0))
            await sink.send(Control("closed", 1, "close"))
            await sink.send(frame("open", 0))
            found = await received(source, lambda m: isinstance(m, Heartbeat))
        assert {m.stream for m in found if isinstance(m, Heartbeat)} == {"open"}


async def test_closing_announces_where_each_stream_ends() -> None:
    async with ZmqSource("pull", [LOCAL], bind=True) as source:
        async with ZmqSink("push", source.endpoints, heartbeat=60, linger=5) as sink:
            for item in frames(20, streams=2):
                await sink.send(item)
        found = await received(source, lambda m: isinstance(m, Heartbeat) and m.stream == "s1")
        found += [] if sum(isinstance(m, Heartbeat) for m in found) == 2 else await _ready(source)
    ends = {m.stream: m.next_sequence for m in found if isinstance(m, Heartbeat)}
    assert ends == {"s0": 10, "s1": 10}


async def test_closing_lets_the_queue_leave() -> None:
    async with ZmqSource("pull", [LOCAL], bind=True, hwm=10) as source:
        sink = ZmqSink("push", source.endpoints, hwm=5_000, linger=10, heartbeat=0)
        async with sink:
            for item in frames(5_000, num_events=4_000):  # 80 MB: most of it is still in the queue
                await sink.send(item)
            closing = asyncio.create_task(sink.close())
            found = await collect(source, 5_000)
            await closing
    assert sequences(found) == {"s0": list(range(0, 20_000_000, 4_000))}


async def test_an_oversized_message_ends_its_connection_and_is_counted() -> None:
    async with (
        ZmqSource("pull", [LOCAL], bind=True, max_message_bytes=1_000) as source,
        ZmqSink("push", source.endpoints, heartbeat=0) as sink,
    ):
        await sink.send(frame("s", 0))
        await sink.send(frame("s", 1, 1_000))
        found = await collect(source, 1)
        await eventually(lambda: source.stats.reconnects >= 1, "counting the ended connection")
        after = asyncio.ensure_future(collect(source, 1))
        sequence = 1_001
        while not after.done():  # what is sent before the sender has noticed goes down with the old connection
            await sink.send(frame("s", sequence))
            sequence += 1
            await asyncio.sleep(0.01)
        found += await after
    first, *rest = sequences(found)["s"]
    assert first == 0
    assert rest
    assert min(rest) > 1_000, "the oversized message came through"


async def test_more_than_two_parts_are_no_message() -> None:
    async with ZmqSource("pull", [LOCAL], bind=True) as source:
        context = zmq.Context()
        with context.socket(zmq.PUSH) as raw:
            raw.connect(source.endpoints[0])
            raw.send_multipart([b"a", b"b", encode(frame("s", 0))])
            raw.send_multipart([b"topic", encode(frame("s", 1))])
            raw.send_multipart([encode(frame("s", 2))])
            assert sequences(await collect(source, 2)) == {"s": [1, 2]}
        context.term()
        assert source.stats.bad_messages == 1


async def test_one_source_reads_several_endpoints() -> None:
    ports = [free_port() for _ in range(3)]
    endpoints = [f"tcp://127.0.0.1:{port}" for port in ports]
    url = f"zmq+pull://127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}?endpoint={endpoints[2]}"
    async with open_source(url) as source:
        for i, endpoint in enumerate(endpoints):
            async with ZmqSink("push", [endpoint], bind=True) as sink:
                await sink.send(frame(f"s{i}", 0))
                await collect(source, 1)
    assert source.stats.messages >= 3


@pytest.mark.parametrize("form", ["zmq+pull://{}", "zmq+pull://?endpoint=ipc://{}"])
async def test_a_path_is_a_unix_socket_for_its_owner_alone(tmp_path: Path, form: str) -> None:
    path = tmp_path / "feed.sock"
    async with open_source(form.format(path) + ("&" if "?" in form else "?") + "bind=1") as source:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with open_sink(f"zmq+push://{path}") as sink:
            await sink.send(frame("s", 0))
            await collect(source, 1)


async def test_inproc_joins_two_connectors_of_one_process() -> None:
    async with (
        open_source("zmq+pull://?endpoint=inproc://join&bind=1") as source,
        open_sink("zmq+push://?endpoint=inproc://join") as sink,
    ):
        await sink.send(frame("s", 0))
        await collect(source, 1)


async def test_push_waits_for_room_and_can_be_cancelled() -> None:
    async with ZmqSink("push", [LOCAL], bind=True, heartbeat=0) as sink:
        sending = [asyncio.create_task(sink.send(frame("s", i))) for i in range(3)]
        assert await settled(lambda: sink.stats.messages) == 0
        sending[1].cancel()
        async with ZmqSource("pull", sink.endpoints) as source:
            assert sequences(await collect(source, 2)) == {"s": [0, 2]}
        await asyncio.wait(sending)


async def test_closing_wakes_a_waiting_sender() -> None:
    sink = ZmqSink("push", [LOCAL], bind=True, heartbeat=0)
    await sink.__aenter__()
    sending = asyncio.create_task(sink.send(frame("s", 0)))
    await asyncio.sleep(0.01)
    await sink.close()
    with pytest.raises(SendError, match="closed"):
        await sending


async def test_a_drain_leaves_other_tasks_their_turn() -> None:
    """512 messages a wake-up, then the loop: a flood must not starve the rest."""
    async with ZmqSource("pull", [LOCAL], bind=True, hwm=100_000) as source:
        async with ZmqSink("push", source.endpoints, hwm=100_000, linger=10, heartbeat=0) as sink:
            for item in frames(5_000):
                await sink.send(item)
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        sizes = []
        async for batch in source.frames():
            sizes.append(len(batch))
            if sum(sizes) == 5_000:
                break
        counting.cancel()
    assert max(sizes) <= 512
    assert turns >= len(sizes)


# --- setting up ------------------------------------------------------------------------------------------------------


async def test_an_address_in_use_is_named() -> None:
    async with ZmqSource("pull", [LOCAL], bind=True) as first:
        with pytest.raises(ConnectError, match=rf"{first.endpoints[0]}.*in use.*choose another port"):
            await ZmqSource("pull", first.endpoints, bind=True).__aenter__()
    async with ZmqSource("pull", first.endpoints, bind=True):  # the port is free again at once
        pass


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1", "nonsense", "xyz://127.0.0.1:1"])
async def test_a_bad_endpoint_is_named(endpoint: str) -> None:
    with pytest.raises(ConnectError, match=endpoint):
        await ZmqSource("sub", [endpoint]).__aenter__()


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "192.0.2.1", "[::]", "example.org"])
def test_an_open_bind_needs_curve(host: str) -> None:
    with pytest.raises(ConfigError, match="without CURVE"):
        open_source(f"zmq+pull://{host}:5555?bind=1")
    with pytest.raises(ConfigError, match="without CURVE"):
        open_sink(f"zmq+pub://{host}:5555?bind=1")
    open_source(f"zmq+pull://{host}:5555?bind=1&insecure=1")
    open_source(f"zmq+pull://{host}:5555")  # connecting is the other side's decision


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "[::1]"])
def test_a_loopback_bind_needs_none(host: str) -> None:
    open_source(f"zmq+pull://{host}:5555?bind=1")


def test_options_out_of_range_are_refused() -> None:
    for option in ("hwm=0", "max_message_bytes=0", "ping=-1"):
        with pytest.raises(ConfigError, match=option.partition("=")[0]):
            open_source(f"zmq+sub://127.0.0.1:5555?{option}")
    with pytest.raises(ConfigError, match=r"topic.*zmq\+sub only"):
        open_source("zmq+pull://127.0.0.1:5555?topic=a")
    with pytest.raises(ConfigError, match="at least one address"):
        open_source("zmq+pull://")
    with pytest.raises(ConfigError, match="65535"):
        open_source("zmq+pull://127.0.0.1:65536")


def test_what_a_decoder_accepts_fits_a_socket() -> None:
    source = ZmqSource("pull", ["tcp://127.0.0.1:1"])
    assert source._link._options[zmq.MAXMSGSIZE] == MAX_MESSAGE_BYTES


# --- CURVE -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    for name in ("server", "known", "stranger"):
        zmq.auth.create_certificates(tmp_path, name)
    clients = tmp_path / "clients"
    clients.mkdir()
    (tmp_path / "known.key").rename(clients / "known.key")
    return tmp_path


async def test_curve_lets_a_known_key_in(keys: Path) -> None:
    url = f"zmq+pull://127.0.0.1:{free_port()}"
    guard = f"curve_key={keys}/server.key_secret&curve_clients={keys}/clients"
    async with open_source(f"{url}?bind=1&{guard}") as source:
        client = f"curve_key={keys}/known.key_secret&curve_server={keys}/server.key"
        async with open_sink(f"{url.replace('pull', 'push')}?{client}") as sink:
            await sink.send(frame("s", 0))
            await collect(source, 1)


@pytest.mark.parametrize("wrong", ["unknown client", "wrong server key", "no curve at all"])
async def test_curve_keeps_others_out(keys: Path, wrong: str, caplog: pytest.LogCaptureFixture) -> None:
    secret = zmq.auth.load_certificate(keys / "server.key_secret")[1]
    source = ZmqSource("pull", [LOCAL], bind=True, curve_secret=secret, curve_clients=keys / "clients")
    async with source:
        options = {
            "unknown client": {"curve_key": keys / "stranger.key_secret", "curve_server": str(keys / "server.key")},
            "wrong server key": {"curve_key": keys / "known.key_secret", "curve_server": str(keys / "stranger.key")},
            "no curve at all": {},
        }[wrong]
        async with ZmqSink("push", source.endpoints, heartbeat=0, linger=0, **options) as sink:
            await sink.send(frame("s", 0))
            await eventually(lambda: "handshake" in caplog.text, "a warning about the handshake")
            known = {"curve_key": keys / "known.key_secret", "curve_server": str(keys / "server.key")}
            async with ZmqSink("push", source.endpoints, heartbeat=0, **known) as good:
                await good.send(frame("good", 0))
                assert sequences(await collect(source, 1)) == {"good": [0]}


def test_curve_options_that_cannot_work_are_refused(keys: Path) -> None:
    secret = str(keys / "known.key_secret")
    public = str(keys / "server.key")
    url = "zmq+pull://127.0.0.1:5555"
    for query, what in [
        (f"curve_key={secret}", "curve_server"),
        (f"bind=1&curve_server={public}", "curve_server"),
        (f"bind=1&curve_clients={keys}", "curve_clients"),
        (f"curve_key={public}&curve_server={public}", "secret key"),
        (f"curve_key={keys}/none&curve_server={public}", "none"),
        (f"bind=1&curve_key={secret}&curve_clients={keys}/nowhere", "curve_clients"),
        ("curve_server=short", "short"),
    ]:
        with pytest.raises(ConfigError, match=what):
            open_source(f"{url}?{query}")
    with pytest.raises(ConfigError, match=r"curve_secret.*URL"):
        open_source(f"{url}?curve_secret=abc")
    with pytest.raises(ConfigError, match="curve_secret"):
        open_source(url, curve_secret=b"short", curve_server=public)
