"""The wire as strangers speak it: the plain `msgpack` package, the bytes in docs/wire.md, and a client without us."""

import json
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from struct import pack as struct_pack
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from streamattn.frame import (
    GAP,
    LATE,
    MAX_EVENTS,
    MAX_FEATURES,
    MAX_HEADS,
    MAX_MESSAGE_BYTES,
    Control,
    Fault,
    Frame,
    Heartbeat,
    Message,
    Reply,
    Result,
    decode,
    encode,
)

ROOT = Path(__file__).resolve().parent.parent
SPECIFICATION = (ROOT / "docs" / "wire.md").read_text("utf-8")

FIELDS = {
    "e": "kind version stream epoch sequence event_ns num_events ids num_features features offsets_ns answer",
    "o": "kind version stream epoch sequence num_events event_ns arrival_ns start_ns end_ns flags missing heads",
    "c": "kind version stream epoch op request value",
    "a": "kind version stream epoch request value",
    "h": "kind version stream epoch next_sequence time_ns",
    "x": "kind version stream request code message",
}

# Each message twice: as the array that any MessagePack library would write, and as ours.
IDS = struct_pack("<3i", 5, -1, 2**31 - 1)
FLOATS = struct_pack("<6f", 0.5, -2, 0, 1e-3, 3e38, -1)
OFFSETS = struct_pack("<3q", 0, 250_000, -7)
FEATURES = np.array([[0.5, -2], [0, 1e-3], [3e38, -1]], np.float32)
BOTH: list[tuple[list[Any], Message]] = [
    (
        ["e", 1, "ES", 3, 1000, 1_700_000_000_000_000_000, 3, IDS, 2, FLOATS, OFFSETS, 0],
        Frame(
            "ES",
            3,
            1000,
            1_700_000_000_000_000_000,
            np.array([5, -1, 2**31 - 1], np.int32),
            FEATURES,
            np.array([0, 250_000, -7]),
        ),
    ),
    (
        ["e", 1, "ES", 2**63 - 1, 0, -1, 1, IDS[:4], 0, None, None, 1],
        Frame("ES", 2**63 - 1, 0, -1, np.array([5], np.int32), answer="last"),
    ),
    (
        ["e", 1, "Straße 7", 0, 2**63 - 4, -(2**63), 3, None, 2, FLOATS, None, 2],
        Frame("Straße 7", 0, 2**63 - 4, -(2**63), features=FEATURES, answer="none"),
    ),
    (
        ["o", 1, "ES", 3, 1000, 3, -5, 10, 20, 30, 3, 4, {"p": ["f4", [3, 2], FLOATS], "class": ["i4", [3], IDS]}],
        Result(
            "ES",
            3,
            1000,
            3,
            -5,
            10,
            20,
            30,
            {"p": FEATURES, "class": np.array([5, -1, 2**31 - 1], np.int32)},
            LATE | GAP,
            4,
        ),
    ),
    (
        ["o", 1, "ES", 3, 1000, 7, 0, 0, 0, 0, 0, 0, {"t": ["i8", [1, 3, 1, 1], OFFSETS]}],
        Result("ES", 3, 1000, 7, 0, 0, 0, 0, {"t": np.array([0, 250_000, -7]).reshape(1, 3, 1, 1)}),
    ),
    (["o", 1, "ES", 3, 1000, 7, 0, 0, 0, 0, 0, 0, {}], Result("ES", 3, 1000, 7, 0, 0, 0, 0)),
    (["c", 1, "ES", 3, "rollback", 200, 70_000], Control("ES", 3, "rollback", 200, 70_000)),
    *[(["c", 1, "ES", 3, op, 1, 0], Control("ES", 3, op, 1)) for op in ("open", "close", "reset", "mark")],
    (["a", 1, "ES", 3, 200, 2**40], Reply("ES", 3, 200, 2**40)),
    (["h", 1, "ES", 3, 1003, -1], Heartbeat("ES", 3, 1003, -1)),
    (["x", 1, "", 0, "overloaded", "no lane is free\n"], Fault("", 0, "overloaded", "no lane is free\n")),
    (["x", 1, "ES", 200, "bad_input", "ids: expected …"], Fault("ES", 200, "bad_input", "ids: expected …")),
]


def pack(value: Any, **options: Any) -> bytes:
    return bytes(msgpack.Packer(**options).pack(value))


def unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, raw=False, strict_map_key=True)


def plain(message: Message) -> dict[str, Any]:
    """Return a message with its arrays as (dtype, nested lists)."""
    found: dict[str, Any] = {"type": type(message).__name__}
    for name in message.__dataclass_fields__:
        value = getattr(message, name)
        arrays = value if isinstance(value, dict) else {"": value}
        found[name] = {k: (v.dtype.str, v.tolist()) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}
    return found


@pytest.mark.parametrize(("array", "message"), BOTH)
def test_plain_msgpack_writes_what_we_read(array: list[Any], message: Message) -> None:
    assert plain(decode(pack(array))) == plain(message)


@pytest.mark.parametrize(("array", "message"), BOTH)
def test_plain_msgpack_reads_what_we_write(array: list[Any], message: Message) -> None:
    found = unpack(encode(message))
    assert found == array
    assert [type(value) for value in found] == [type(value) for value in array]  # 1 == 1.0 == True, the wire differs
    assert len(found) == len(FIELDS[found[0]].split())


@pytest.mark.parametrize(("array", "message"), BOTH)
def test_our_bytes_are_those_of_plain_msgpack(array: list[Any], message: Message) -> None:
    assert encode(message) == pack(array)


def test_ints_of_any_width_are_taken() -> None:
    wide = b"\x96\xd9\x01h\xd3\0\0\0\0\0\0\0\x01\xda\0\x02ES\xce\0\0\0\x03\xcf\0\0\0\0\0\0\x03\xeb\xd0\xff"
    assert plain(decode(wide)) == plain(Heartbeat("ES", 3, 1003, -1))


# --- docs/wire.md ----------------------------------------------------------------------------------------------------


def dumps() -> list[list[tuple[bytes, str]]]:
    """Return the hex blocks of the specification: lines of (bytes, what the text says they are)."""
    blocks = re.findall(r"^```hex\n(.*?)^```", SPECIFICATION, re.MULTILINE | re.DOTALL)
    return [[(bytes.fromhex(line[:56]), line[56:].strip()) for line in block.splitlines()] for block in blocks]


@pytest.mark.parametrize("lines", dumps(), ids=["frame", "result", "heartbeat"])
def test_every_line_of_a_dump_is_what_the_text_says(lines: list[tuple[bytes, str]]) -> None:
    names = []
    for data, text in lines:
        if container := re.fullmatch(r"(array|map) of (\d+)", text):
            unpacker = msgpack.Unpacker()
            unpacker.feed(data)
            header = unpacker.read_array_header() if container[1] == "array" else unpacker.read_map_header()
            assert (header, unpacker.tell()) == (int(container[2]), len(data))
            continue
        name, value = text.split(": ", 1)
        names.append(name)
        value = json.loads(value)
        if isinstance(value, str) and value.startswith("hex:"):
            value = bytes.fromhex(value[4:])
        found = unpack(data)
        assert (type(found), found) == (type(value), value), text
    order = FIELDS[unpack(lines[1][0])].split()
    assert names[: len(order) - 1] == order[:-1]  # a result's last field is taken apart


def test_the_dumps_decode_to_what_the_text_says() -> None:
    frame, result, heartbeat = (decode(b"".join(data for data, _ in lines)) for lines in dumps())
    time_ns = 1_700_000_000_000_000_000
    ids, features = np.array([5, -1], np.int32), np.array([[0.5], [-2]], np.float32)
    assert plain(frame) == plain(Frame("ES", 3, 1000, time_ns, ids, features, np.array([0, 250_000])))
    heads = {"next": np.array([[0.25], [0.75]], np.float32)}
    assert plain(result) == plain(Result("ES", 3, 1000, 2, time_ns, 10, 20, 30, heads, GAP, 4))
    assert plain(heartbeat) == plain(Heartbeat("ES", 3, 1002, time_ns + 1_000_000))


def test_the_tables_name_every_field_in_order() -> None:
    sections = re.findall(r'^## \w+ `"(\w)"`.*?\n(.*?)(?=^## )', SPECIFICATION, re.MULTILINE | re.DOTALL)
    tables = {kind: re.findall(r"^\| (\d+) \| (\w+) \|", body, re.MULTILINE) for kind, body in sections}
    assert {kind: " ".join(name for _, name in rows) for kind, rows in tables.items()} == FIELDS
    for rows in tables.values():
        assert [int(number) for number, _ in rows] == list(range(len(rows)))


def test_the_limits_are_the_stated_ones() -> None:
    section = SPECIFICATION.split("## Limits")[1].split("\n## ")[0]
    numbers = [int(found.replace(",", "")) for found in re.findall(r"^\| [^|]+ \| ([\d,]+)", section, re.MULTILINE)]
    assert numbers == [MAX_MESSAGE_BYTES, MAX_EVENTS, MAX_FEATURES, MAX_HEADS, 4, 128, 512]


def test_the_error_codes_are_the_stated_ones() -> None:
    stated = set(re.findall(r"^\| `([a-z_]+)` \|", SPECIFICATION, re.MULTILINE))
    assert stated == {
        "bad_frame", "bad_version", "too_large", "bad_input", "stale_epoch", "unknown_stream", "overloaded",
        "unauthorized", "draining", "internal",
    }  # fmt: skip
    for code in stated:
        assert plain(decode(encode(Fault("", 0, code, "")))) == plain(Fault("", 0, code, ""))


# --- examples/wire_client.py -----------------------------------------------------------------------------------------


class EchoPeer:
    """Stands where an engine would: takes frames, answers each with its own ids. Speaks through our codec."""

    def __init__(self, frames: str, results: str) -> None:
        self.received: list[Frame | Control | Heartbeat] = []
        self._endpoints = (frames, results)
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "EchoPeer":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.SUB) as source, context.socket(zmq.PUB) as sink:
            sink.linger = 0
            source.subscribe("sa/in/")
            source.bind(self._endpoints[0])
            sink.bind(self._endpoints[1])
            self._ready.set()
            while not self._stop.is_set():
                if not source.poll(20):
                    continue
                topic, data = source.recv_multipart()
                message = decode(data)
                assert isinstance(message, Frame | Control | Heartbeat)
                assert topic.decode() == f"sa/in/{message.stream}"
                self.received.append(message)
                for stream in (message.stream + "2", message.stream):  # a neighbour whose name begins alike
                    sink.send_multipart([stream.encode(), encode(self._answer(message, stream))])

    def _answer(self, message: Frame | Control | Heartbeat, stream: str) -> Message:
        if isinstance(message, Control):
            return Reply(stream, message.epoch, message.request, 0)
        if isinstance(message, Heartbeat):
            return message
        assert message.ids is not None
        heads = {"echo": message.ids if stream == message.stream else message.ids + 100}
        span = (message.sequence, len(message), message.event_ns)
        return Result(stream, message.epoch, *span, 1, 2, 3, heads)


@pytest.fixture
def endpoints() -> tuple[str, str]:
    with socket.socket() as a, socket.socket() as b:
        for each in (a, b):
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in (a, b)]
    return f"tcp://127.0.0.1:{ports[0]}", f"tcp://127.0.0.1:{ports[1]}"


def start_client(frames: str, results: str, events: int, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        str(ROOT / "examples" / "wire_client.py"),
        "--frames-to",
        frames,
        "--results-from",
        results,
    ]
    command += ["--stream", "ES", "--events", str(events), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(client: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    try:
        out, err = client.communicate(timeout=60)
    finally:
        client.kill()
        client.wait()
    return client.returncode, out.splitlines(), err


@pytest.mark.parametrize("first", ["peer", "client"])
def test_the_example_client_loses_nothing_whoever_comes_first(endpoints: tuple[str, str], first: str) -> None:
    events = 500  # many times what it keeps in flight
    peer = EchoPeer(*endpoints)
    if first == "peer":
        with peer:
            code, lines, errors = finish(start_client(*endpoints, events, "--features", "3"))
    else:
        client = start_client(*endpoints, events, "--features", "3")
        assert client.stdout is not None
        assert client.stdout.readline().startswith("waiting for ")
        with peer:
            code, lines, errors = finish(client)
    assert (code, errors) == (0, "")
    frames = [message for message in peer.received if isinstance(message, Frame)]
    assert [frame.sequence for frame in frames] == list(range(events))
    sent = np.concatenate([frame.ids for frame in frames if frame.ids is not None]).tolist()
    assert set(sent) == {0, 1}
    assert all(frame.features is not None and frame.features.shape == (1, 3) for frame in frames)
    printed = [line for line in lines if " echo " in line]
    assert printed == [f"{i} echo {id_}" for i, id_ in enumerate(sent)]
    ops = [message.op for message in peer.received if isinstance(message, Control)]
    assert ops[0] == "open"
    assert set(ops) <= {"open", "close"}
    first_frame = next(i for i, message in enumerate(peer.received) if isinstance(message, Frame))
    assert all(isinstance(message, Control) for message in peer.received[:first_frame])


def test_the_example_client_imports_nothing_of_ours() -> None:
    text = (ROOT / "examples" / "wire_client.py").read_text("utf-8")
    assert not re.search(r"^\s*(from|import)\s+streamattn", text, re.MULTILINE)
    assert len(text.splitlines()) <= 80
