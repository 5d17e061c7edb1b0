"""The codec: what goes in comes out, and nothing else comes in."""

import dataclasses
import tracemalloc
from collections.abc import Iterator
from typing import Any, get_args

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from streamattn.errors import FrameError
from streamattn.frame import (
    GAP,
    LATE,
    MAX_EVENTS,
    MAX_FEATURES,
    MAX_HEADS,
    MAX_MESSAGE_BYTES,
    Answer,
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

MAX_INT = 2**63 - 1
HALF = 2**62 - 1  # two of these add up without leaving int64


def pack(value: Any) -> bytes:
    data = msgpack.packb(value)
    assert data is not None
    return data


# --- strategies ------------------------------------------------------------------------------------------------------

letters = st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))
names = st.text(letters, min_size=1, max_size=128)
counts = st.one_of(st.integers(0, 300), st.integers(0, MAX_INT))
times = st.integers(-(2**63), MAX_INT)
starts = st.one_of(st.integers(0, 300), st.integers(0, MAX_INT - MAX_EVENTS))
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    n = draw(st.one_of(st.integers(1, 5), st.sampled_from([31, 33, 257])))
    columns = draw(st.sampled_from(["ids", "features", "both"]))
    ids = features = offsets = None
    if columns != "features":
        ids = draw(hnp.arrays(np.int32, n))
    if columns != "ids":
        features = draw(hnp.arrays(np.float32, (n, draw(st.sampled_from([1, 2, 7, 40]))), elements=floats))
    if draw(st.booleans()):
        offsets = draw(hnp.arrays(np.int64, n, elements=st.integers(-HALF, HALF)))
    event_ns = draw(st.integers(-HALF, HALF))
    answer: Answer = draw(st.sampled_from(get_args(Answer)))
    return Frame(draw(names), draw(counts), draw(starts), event_ns, ids, features, offsets, answer)


@st.composite
def results(draw: st.DrawFn) -> Result:
    n = draw(st.integers(1, 9))
    heads = {}
    for name in draw(st.lists(st.text(letters, min_size=1, max_size=64), unique=True, max_size=4)):
        dtype = draw(st.sampled_from([np.float32, np.int32, np.int64]))
        shape = (draw(st.sampled_from([1, n])), *draw(st.lists(st.integers(1, 4), max_size=3)))
        heads[name] = draw(hnp.arrays(dtype, shape))  # NaN and infinity included
    moments = (draw(times), draw(times), draw(times), draw(times))
    return Result(draw(names), draw(counts), draw(starts), n, *moments, heads, draw(st.integers(0, 255)), draw(counts))


controls = st.builds(
    Control, names, counts, st.sampled_from(["open", "close", "reset", "mark", "rollback"]), counts, counts
)
faults = st.builds(
    Fault,
    st.one_of(st.just(""), names),
    counts,
    st.from_regex(r"\A[a-z_]{1,32}\Z"),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=512),
)
messages: st.SearchStrategy[Message] = st.one_of(
    frames(),
    results(),
    controls,
    st.builds(Reply, names, counts, counts, counts),
    st.builds(Heartbeat, names, counts, counts, times),
    faults,
)


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    for field in dataclasses.fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, dict):
            assert list(a) == list(b)
            for name in b:
                assert_same_array(a[name], b[name])
        elif isinstance(b, np.ndarray):
            assert_same_array(a, b)
        else:
            assert (type(a), a) == (type(b), b), field.name


def assert_same_array(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()  # NaN equals itself here
    assert not found.flags.writeable


# --- round trips -----------------------------------------------------------------------------------------------------


@given(messages)
@settings(max_examples=400, deadline=None)
def test_what_is_encoded_is_decoded(message: Message) -> None:
    data = encode(message)
    assert_same(decode(data), message)
    assert encode(decode(data)) == data


@pytest.mark.parametrize("n", [1, MAX_EVENTS])
def test_frames_of_one_and_of_most_events(n: int) -> None:
    ids = np.arange(n, dtype=np.int32)
    features = np.linspace(-1, 1, n, dtype=np.float32).reshape(n, 1)
    assert_same(
        decode(encode(Frame("ES", 3, MAX_INT - n, 0, ids, features))), Frame("ES", 3, MAX_INT - n, 0, ids, features)
    )


def test_the_extremes_fit() -> None:
    widest = Frame("é" * 128, MAX_INT, 0, -(2**63), features=np.full((1, MAX_FEATURES), 3.4e38, np.float32))
    assert_same(decode(encode(widest)), widest)
    late = Frame("s", 0, 0, MAX_INT, np.array([-(2**31), 2**31 - 1], np.int32), None, np.array([0, -MAX_INT]))
    assert_same(decode(encode(late)), late)
    heads = {f"{i:064d}": np.ones((1, 1, 1, 1), np.float32) for i in range(MAX_HEADS)}
    wide = Result("s", 0, 0, 2**31 - 1, 0, 0, 0, 0, heads, 255, MAX_INT)
    assert_same(decode(encode(wide)), wide)


def test_arrival_is_stamped_on_frames_and_nothing_of_ours_travels() -> None:
    sent = Frame("ES", 1, 2, 3, np.array([4], np.int32), arrival_ns=5, deadline_ns=6)
    received = decode(encode(sent), arrival_ns=77)
    assert isinstance(received, Frame)
    assert (received.arrival_ns, received.deadline_ns) == (77, None)
    assert encode(sent) == encode(dataclasses.replace(sent, arrival_ns=0, deadline_ns=None))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, ">i4", np.uint32, np.int64, np.uint64])
def test_ids_of_any_integer_dtype_become_int32(dtype: Any) -> None:
    received = decode(encode(Frame("s", 0, 0, 0, np.array([0, 1, 127], dtype))))
    assert isinstance(received, Frame)
    assert received.ids is not None
    assert received.ids.dtype == np.int32
    assert received.ids.tolist() == [0, 1, 127]


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        (np.float16, np.float32),
        (np.float64, np.float32),
        (">f4", np.float32),
        (np.int8, np.int32),
        (np.uint16, np.int32),
        (np.uint32, np.int64),
        (np.int64, np.int64),
    ],
)
def test_heads_become_float32_int32_or_int64(sent: Any, received: Any) -> None:
    result = decode(encode(Result("s", 0, 0, 2, 0, 0, 0, 0, {"h": np.array([[1, 2], [3, 4]], sent)})))
    assert isinstance(result, Result)
    assert result.heads["h"].dtype == received
    assert result.heads["h"].tolist() == [[1, 2], [3, 4]]


def test_a_head_beyond_float32_becomes_infinite() -> None:
    result = decode(encode(Result("s", 0, 0, 1, 0, 0, 0, 0, {"h": np.array([1e300, -1e300, np.nan])[None]})))
    assert isinstance(result, Result)
    np.testing.assert_array_equal(result.heads["h"], np.array([[np.inf, -np.inf, np.nan]], np.float32))


def test_columns_need_not_be_contiguous() -> None:
    wide = np.arange(24, dtype=np.float32).reshape(4, 6)
    received = decode(encode(Frame("s", 0, 0, 0, np.arange(8, dtype=np.int32)[::2], wide[:, ::3])))
    assert isinstance(received, Frame)
    assert received.ids is not None
    assert received.features is not None
    assert received.ids.tolist() == [0, 2, 4, 6]
    np.testing.assert_array_equal(received.features, wide[:, ::3])


def test_a_fault_is_always_sendable() -> None:
    fault = decode(encode(Fault("", 0, "internal", "no file \udcff" + "x" * 600)))
    assert isinstance(fault, Fault)
    assert len(fault.message) == 512
    assert fault.message.startswith("no file \\udcffxxx")


# --- refusals --------------------------------------------------------------------------------------------------------

ONE = np.array([1], np.int32)
FRAME = Frame("s", 0, 0, 0, ONE)
RESULT = Result("s", 0, 0, 2, 0, 0, 0, 0)
BEAT = Heartbeat("s", 0, 0, 0)
BIG = np.broadcast_to(np.float32(0), (60_000, 4_000))  # claims 960 MB, holds 4 bytes


def floats_of(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (None, "message: expected a Frame, Result or other message, found NoneType"),
        (dataclasses.replace(FRAME, ids=None), "num_events: expected `int` >= 1"),
        (dataclasses.replace(FRAME, ids=ONE[:0]), "num_events: expected `int` >= 1"),
        (
            dataclasses.replace(FRAME, ids=np.zeros(MAX_EVENTS + 1, np.int32)),
            f"num_events: expected `int` <= {MAX_EVENTS}",
        ),
        (dataclasses.replace(FRAME, ids=[1]), "ids: expected an array of integers, [n], found list"),
        (dataclasses.replace(FRAME, ids=floats_of(1)), "ids: expected an array of integers, [n], found float32, [1]"),
        (dataclasses.replace(FRAME, ids=np.array([True])), "ids: expected an array of integers, [n], found bool, [1]"),
        (dataclasses.replace(FRAME, ids=ONE[None]), "ids: expected an array of integers, [n], found int32, [1, 1]"),
        (dataclasses.replace(FRAME, ids=np.array(1)), "ids: expected an array of integers, [n], found int64, []"),
        (
            dataclasses.replace(FRAME, ids=np.array([0, 2**31])),
            "ids: expected values that fit int32, found 0 to 2147483648",
        ),
        (
            dataclasses.replace(FRAME, features=floats_of(1, 2, dtype=np.float64)),
            "features: expected an array of float32, [1, d], found float64, [1, 2]",
        ),
        (
            dataclasses.replace(FRAME, features=floats_of(2, 2)),
            "features: expected an array of float32, [1, d], found float32, [2, 2]",
        ),
        (
            dataclasses.replace(FRAME, ids=None, features=floats_of(2)),
            "features: expected an array of float32, [n, d], found float32, [2]",
        ),
        (
            dataclasses.replace(FRAME, features=floats_of(1, 0)),
            "features: expected nil exactly where num_features is 0, found num_features 0",
        ),
        (dataclasses.replace(FRAME, features=floats_of(1, MAX_FEATURES + 1)), "num_features: expected `int` <= 4096"),
        (
            dataclasses.replace(FRAME, features=np.array([[np.nan]], np.float32)),
            "features: expected finite floats, found NaN or infinity",
        ),
        (
            dataclasses.replace(FRAME, features=np.full((1, 40), np.inf, np.float32)),
            "features: expected finite floats, found NaN or infinity",
        ),
        (
            dataclasses.replace(FRAME, offsets_ns=ONE),
            "offsets_ns: expected an array of int64, [1], found int32, [1]",
        ),
        (
            dataclasses.replace(FRAME, offsets_ns=np.zeros(2, np.int64)),
            "offsets_ns: expected an array of int64, [1], found int64, [2]",
        ),
        (
            dataclasses.replace(FRAME, event_ns=1, offsets_ns=np.array([MAX_INT])),
            "offsets_ns: expected times event_ns + offset that fit int64, found one that does not",
        ),
        (dataclasses.replace(FRAME, answer="all"), "answer: expected one of each, last, none, found 'all'"),
        (dataclasses.replace(FRAME, answer=ONE), "answer: expected one of each, last, none, found int32, [1]"),
        (dataclasses.replace(FRAME, epoch=-1), "epoch: expected `int` >= 0"),
        (dataclasses.replace(FRAME, epoch=True), "epoch: expected `int`, found `bool`"),
        (dataclasses.replace(FRAME, sequence=1.0), "sequence: expected `int`, found `float`"),
        (dataclasses.replace(FRAME, sequence=2**64), "Frame: expected fields of the declared types, found: "),
        (dataclasses.replace(FRAME, event_ns=np.int64(1)), "Frame: expected fields of the declared types, found: "),
        (
            dataclasses.replace(FRAME, sequence=MAX_INT),
            f"sequence: expected at most {MAX_INT} - num_events, found {MAX_INT}",
        ),
        (dataclasses.replace(FRAME, stream=""), "stream: expected `str` of length >= 1"),
        (dataclasses.replace(FRAME, stream="é" * 129), "stream: expected `str` of length <= 128"),
        (dataclasses.replace(FRAME, stream=None), "stream: expected `str`, found `None`"),
        (dataclasses.replace(FRAME, stream="\ud800"), "Frame: expected fields of the declared types, found: "),
        (dataclasses.replace(BEAT, stream="a\0"), "stream: expected a name without control characters, found 'a\\x00'"),
        (dataclasses.replace(BEAT, next_sequence=-1), "next_sequence: expected `int` >= 0"),
        (dataclasses.replace(BEAT, time_ns=-(2**63) - 1), "Heartbeat: expected fields of the declared types, found: "),
        (dataclasses.replace(RESULT, num_events=0), "num_events: expected `int` >= 1"),
        (dataclasses.replace(RESULT, flags=256), "flags: expected `int` <= 255"),
        (dataclasses.replace(RESULT, missing=-1), "missing: expected `int` >= 0"),
        (dataclasses.replace(RESULT, heads=None), "heads: expected a dict of arrays, found NoneType"),
        (dataclasses.replace(RESULT, heads={1: floats_of(1)}), "heads: expected `str`, found `int`"),
        (dataclasses.replace(RESULT, heads={"": floats_of(1)}), "heads: expected `str` of length >= 1"),
        (
            dataclasses.replace(RESULT, heads={"\n": floats_of(1)}),
            "head: expected a name without control characters, found '\\n'",
        ),
        (
            dataclasses.replace(RESULT, heads={str(i): floats_of(1) for i in range(33)}),
            "heads: expected `object` of length <= 32",
        ),
        (
            dataclasses.replace(RESULT, heads={"h": [1.0]}),
            "head 'h': expected an array of floats or of integers that fit int64, found list",
        ),
        (
            dataclasses.replace(RESULT, heads={"h": np.array([True])}),
            "head 'h': expected an array of floats or of integers that fit int64, found bool, [1]",
        ),
        (
            dataclasses.replace(RESULT, heads={"h": np.array([1], np.uint64)}),
            "head 'h': expected an array of floats or of integers that fit int64, found uint64, [1]",
        ),
        (
            dataclasses.replace(RESULT, heads={"h": floats_of(1, dtype=np.complex64)}),
            "head 'h': expected an array of floats or of integers that fit int64, found complex64, [1]",
        ),
        (dataclasses.replace(RESULT, heads={"h": floats_of()}), "heads[...][1]: expected `array` of length >= 1"),
        (
            dataclasses.replace(RESULT, heads={"h": floats_of(1, 1, 1, 1, 1)}),
            "heads[...][1]: expected `array` of length <= 4",
        ),
        (dataclasses.replace(RESULT, heads={"h": floats_of(2, 0)}), "heads[...][1][1]: expected `int` >= 1"),
        (dataclasses.replace(RESULT, heads={"h": floats_of(3, 2)}), "head 'h': expected 1 or 2 rows, found 3"),
        (Control("s", 0, "fly"), "op: expected a known value, found 'fly'"),  # pyright: ignore[reportArgumentType]
        (Fault("s", 0, "Bad Code", ""), "code: expected `str` matching regex"),
        (Fault("s", 0, "x" * 33, ""), "code: expected `str` of length <= 32"),
        (Fault("s", 0, "internal", None), "message: expected `str`, found `None`"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_what_cannot_be_sent_is_named(message: Any, text: str) -> None:
    with pytest.raises(FrameError) as caught:
        encode(message)
    assert str(caught.value).startswith(text)
    assert caught.value.code == "bad_frame"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (Frame("s", 0, 0, 0, features=BIG), "features: expected at most 1048576 bytes a message, found 960000000"),
        (dataclasses.replace(RESULT, heads={"h": BIG}), "head 'h': expected at most 1048576 bytes a message, found"),
        (Frame("s", 0, 0, 0, features=floats_of(64, MAX_FEATURES)), "message: expected at most 1048576 bytes, found"),
    ],
)
def test_what_is_too_large_is_refused_before_it_is_copied(message: Message, text: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FrameError) as caught:
            encode(message)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(text)
    assert caught.value.code == "too_large"
    assert peak < 3 * MAX_MESSAGE_BYTES


E_FIELDS = ["e", 1, "s", 0, 0, 0, 1, b"\1\0\0\0", 0, None, None, 0]
O_FIELDS = ["o", 1, "s", 0, 0, 1, 0, 0, 0, 0, 0, 0, {}]
H_FIELDS = ["h", 1, "s", 0, 0, 0]
NOT_A_MESSAGE = "message: expected one MessagePack array [kind, version, …], found: "


def changed(fields: list[Any], **at: Any) -> bytes:
    copy = list(fields)
    for index, value in at.items():
        copy[int(index[1:])] = value
    return pack(copy)


@pytest.mark.parametrize(
    ("data", "text", "code"),
    [
        (b"", NOT_A_MESSAGE + "Input data was truncated", "bad_frame"),
        (b"\xc0", NOT_A_MESSAGE, "bad_frame"),
        (b'["h",1,"s",0,0,0]', NOT_A_MESSAGE, "bad_frame"),  # JSON
        (pack({"kind": "h"}), NOT_A_MESSAGE, "bad_frame"),
        (pack([]), NOT_A_MESSAGE, "bad_frame"),
        (pack(["h"]), NOT_A_MESSAGE, "bad_frame"),
        (changed(H_FIELDS, _0="z"), "kind: expected one of e, o, c, a, h, x, found 'z'", "bad_frame"),
        (changed(H_FIELDS, _0=b"h"), NOT_A_MESSAGE, "bad_frame"),
        (changed(H_FIELDS, _1=2), "version: expected 1, found 2", "bad_version"),
        (changed(H_FIELDS, _1=0), "version: expected 1, found 0", "bad_version"),
        (pack(["new kind", 2, {"other": "fields"}]), "version: expected 1, found 2", "bad_version"),
        (changed(H_FIELDS, _1="1"), NOT_A_MESSAGE, "bad_frame"),
        (changed(H_FIELDS, _1=True), NOT_A_MESSAGE, "bad_frame"),
        (
            pack([*H_FIELDS, 0]),
            "message: expected 'h' and its 5 fields, found: Expected `array` of at most",
            "bad_frame",
        ),
        (
            pack(H_FIELDS[:-1]),
            "message: expected 'h' and its 5 fields, found: Expected `array` of at least",
            "bad_frame",
        ),
        (pack(H_FIELDS) + b"\0", NOT_A_MESSAGE, "bad_frame"),
        (pack(H_FIELDS) * 2, NOT_A_MESSAGE, "bad_frame"),
        (pack(H_FIELDS)[:-1], NOT_A_MESSAGE, "bad_frame"),
        (
            b"\x96\xa1h\x01\xa2\xff\xfe\0\0\0",
            "message: expected 'h' and its 5 fields, found: 'utf-8' codec",
            "bad_frame",
        ),  # the name is no UTF-8
        (
            b"\x96\xa1h\x01\xa3\xed\xa0\x80\0\0\0",
            "message: expected 'h' and its 5 fields, found: 'utf-8' codec",
            "bad_frame",
        ),  # half a surrogate pair
        (changed(H_FIELDS, _2=b"s"), "stream: expected `str`, found `bytes`", "bad_frame"),
        (changed(H_FIELDS, _2="a\x85"), "stream: expected a name without control characters, found", "bad_frame"),
        (changed(H_FIELDS, _2="a\u2028"), "stream: expected a name without control characters, found", "bad_frame"),
        (changed(H_FIELDS, _3=2**63), "epoch: expected `int` <= 9223372036854775807", "bad_frame"),
        (changed(H_FIELDS, _3=0.0), "epoch: expected `int`, found `float`", "bad_frame"),
        (changed(H_FIELDS, _3=msgpack.ExtType(5, b"1")), "epoch: expected `int`, found `ext`", "bad_frame"),
        (changed(E_FIELDS, _7="abcd"), "ids: expected `bytes | null`, found `str`", "bad_frame"),
        (changed(E_FIELDS, _7=b"abc"), "ids: expected 4 bytes, found 3", "bad_frame"),
        (changed(E_FIELDS, _7=None), "frame: expected ids or features, found neither", "bad_frame"),
        (changed(E_FIELDS, _8=1), "features: expected nil exactly where num_features is 0, found", "bad_frame"),
        (changed(E_FIELDS, _9=b""), "features: expected nil exactly where num_features is 0, found", "bad_frame"),
        (changed(E_FIELDS, _8=2, _9=b"\0" * 4), "features: expected 8 bytes, found 4", "bad_frame"),
        (changed(E_FIELDS, _8=1, _9=b"\0\0\x80\x7f"), "features: expected finite floats, found NaN", "bad_frame"),
        (changed(E_FIELDS, _10=b""), "offsets_ns: expected 8 bytes, found 0", "bad_frame"),
        (changed(E_FIELDS, _5=-(2**63), _10=b"\xff" * 8), "offsets_ns: expected times event_ns + offset", "bad_frame"),
        (changed(E_FIELDS, _4=MAX_INT), "sequence: expected at most", "bad_frame"),
        (changed(E_FIELDS, _11=3), "answer: expected `int` <= 2", "bad_frame"),
        (changed(O_FIELDS, _4=MAX_INT), "sequence: expected at most", "bad_frame"),
        (
            changed(O_FIELDS, _12={"h": ["f8", [1], b"\0" * 8]}),
            "heads[...][0]: expected a known value, found 'f8'",
            "bad_frame",
        ),
        (changed(O_FIELDS, _12={"h": ["f4", [1, 2], b"\0" * 4]}), "head 'h': expected 8 bytes, found 4", "bad_frame"),
        (changed(O_FIELDS, _12={"h": ["f4", [1, 0], b""]}), "heads[...][1][1]: expected `int` >= 1", "bad_frame"),
        (
            changed(O_FIELDS, _12={"h": ["f4", [1, *[2**31 - 1] * 3], b""]}),
            f"head 'h': expected {4 * (2**31 - 1) ** 3} bytes, found 0",
            "bad_frame",
        ),
        (changed(O_FIELDS, _12={"h": ["f4", [1]]}), "heads[...]: expected `array` of", "bad_frame"),
        (changed(O_FIELDS, _12={"h" * 65: ["f4", [1], b"1234"]}), "heads: expected `str` of length <= 64", "bad_frame"),
        (changed(O_FIELDS, _12={"\t": ["f4", [1], b"1234"]}), "head: expected a name without control", "bad_frame"),
        (b"\x90" * (4 << 20), "message: expected at most 1048576 bytes, found 4194304", "too_large"),
        (b"\0" * (MAX_MESSAGE_BYTES + 1), "message: expected at most 1048576 bytes, found 1048577", "too_large"),
    ],
)
def test_what_is_no_message_is_refused_with_the_reason(data: bytes, text: str, code: str) -> None:
    with pytest.raises(FrameError) as caught:
        decode(data)
    assert str(caught.value).startswith(text)
    assert caught.value.code == code
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("data", [bytearray(pack(H_FIELDS)), memoryview(pack(H_FIELDS)), "h", None])
def test_only_bytes_are_decoded(data: Any) -> None:
    with pytest.raises(TypeError, match="data: expected bytes, found"):
        decode(data)


junk = st.one_of(
    st.sampled_from(
        [None, True, -1, 0, 1.5, 2**63, 2**64, -(2**63) - 1, "", "x" * 600, "\0", "\udc80", b"", b"1", [], {}, object()]
    ),
    st.sampled_from([np.int64(1), np.float32(1), np.array(1), np.array(["x"]), np.array([None]), np.array([1j])]),
    st.builds(lambda d, s: np.zeros(s, d), hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_dims=5, min_side=0)),
    st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), st.sampled_from([None, 1, ONE, floats_of(2, 2)])),
    st.recursive(st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=9),
)


@given(messages, st.data())
@settings(max_examples=600, deadline=None)
def test_a_message_with_junk_in_it_is_refused_or_really_valid(message: Any, data: st.DataObject) -> None:
    for field in data.draw(st.lists(st.sampled_from(dataclasses.fields(message)), min_size=1, max_size=2)):
        message = dataclasses.replace(message, **{field.name: data.draw(junk)})
    try:
        sent = encode(message)
    except FrameError:
        return
    assert encode(decode(sent)) == sent


# --- hostile bytes ---------------------------------------------------------------------------------------------------


def corpus() -> list[bytes]:
    """About fifty small valid messages of every kind and option."""
    rng = np.random.default_rng(7)
    found: list[Message] = []
    for n in (1, 2, 3, 9):
        ids = rng.integers(0, 300, n).astype(np.int32)
        features = rng.standard_normal((n, 3)).astype(np.float32)
        offsets = np.arange(n) * 1000
        found += [
            Frame("ES", 1, 7, 10**18, ids),
            Frame("a stream ∞", 2**40, 2**50, -1, ids, None, offsets, "last"),
            Frame("s" * 40, 0, 0, 0, None, features, None, "none"),
            Frame("ES", 1, 70_000, 10**18, ids, features, offsets),
        ]
        heads = {"next": features, "class": ids, "count": offsets}
        for some in ({}, {"next": features}, heads, {"last": features[:1, :, None, None]}):
            found.append(Result("ES", 1, 7, n, 10**18, 1, 2, 3, some, LATE | GAP, 12))
    ops = ("open", "close", "reset", "mark", "rollback")
    found += [Control("ES", 1, op, 5 + i, 2**i) for i, op in enumerate(ops)]
    found += [Reply("ES", 1, 5, value) for value in (0, 200, 2**33)]
    found += [Heartbeat(name, 1, 70_000, 10**18) for name in ("ES", "NQ", "né")]
    found += [
        Fault("", 0, "overloaded", "no lane is free"),
        Fault("ES", 3, "bad_input", "ids: …"),
        Fault("E", 0, "a", ""),
    ]
    return [encode(message) for message in found]


def claims() -> Iterator[bytes]:
    """Headers that claim far more than follows, and depth without end."""
    for header in (
        b"\xdc\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xde\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
    ):
        yield header
        yield header + b"\xa1e\x01"
        for fields in (E_FIELDS, O_FIELDS, H_FIELDS):
            for cut in range(1, len(fields)):
                yield bytes([0x90 | len(fields)]) + b"".join(map(pack, fields[:cut])) + header
    for depth in (100, 100_000):
        for opener in (b"\x91", b"\x81\xa0"):
            yield opener * depth
            yield b"\x96\xa1h\x01\xa1s" + opener * depth
            yield b"\x97\xa1h\x02" + opener * depth
    yield b"\xdd\x00\x0f\xff\x00" + b"\x90" * 0xFFF00
    yield b"\xdd\x00\x0f\xff\x00\xa1h\x01\xa1s" + b"\x90" * 0xFFEFC
    yield b"\xdd\x00\x0f\xff\x00\xa1h\x02" + b"\x90" * 0xFFEFE
    yield pack([*O_FIELDS[:-1], {f"{i:x}": ["f4", [1], b"1234"] for i in range(60_000)}])
    yield pack([*O_FIELDS[:-1], {"h": ["f4", [1] * 10**6, b"1234"]}])
    yield pack([*O_FIELDS[:-1], 0])[:-1] + b"\xde\xff\xff" + b"\xa1h\x93\xa2f4\x91\x01\xc4\x041234" * 0xFFFF
    for kind, at in (("h", 2), ("x", 4), ("z" * 10**6, 0), ("o", 12)):
        yield pack([kind, 1, "s", 0, *["z" * 10**6 if i + 4 >= at else 0 for i in range(2)]])


def test_no_decode_allocates_more_than_a_few_times_its_input() -> None:
    refused = 0
    samples = [*claims(), *corpus(), encode(Frame("s", 0, 0, 0, features=np.ones((60, 4000), np.float32)))]
    tracemalloc.start()
    try:
        for data in samples:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                decode(data)
            except FrameError:
                refused += 1
            assert tracemalloc.get_traced_memory()[1] - before <= 4 * len(data) + 16_384, data[:40]
    finally:
        tracemalloc.stop()
    assert refused == len(list(claims()))


VALID = corpus()


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "insert", "cut", "splice"])):
            case "flip":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=6))
            case "cut":
                del data[at:]
            case _:
                data[at:] = draw(st.sampled_from(VALID))[draw(st.integers(0, 40)) :]
    return bytes(data)


values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=9), st.binary()
    ),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
nearly = st.builds(lambda kind, rest: pack([kind, 1, *rest]), st.sampled_from("eocahx"), st.lists(values, max_size=12))
hostile = st.one_of(
    st.binary(max_size=300),
    mutated(),
    nearly,
    st.builds(pack, values),
    st.builds(lambda a, b: a + b, st.sampled_from(VALID), st.binary(min_size=1, max_size=9)),
    st.builds(
        lambda n, b: b * n, st.integers(1, 100_000), st.sampled_from([b"\x91", b"\x81", b"\x90", b"\xdd", b"\0"])
    ),
)


@given(hostile)
@settings(max_examples=2_000, deadline=None)
def test_hostile_bytes_end_in_one_frame_error(data: bytes) -> None:
    try:
        message = decode(data)
    except FrameError:
        return
    encode(message)


def mutants(seeds: list[bytes], count: int, rng: np.random.Generator) -> Iterator[bytes]:
    """Yield `count` copies of the seeds with one to four bytes flipped, inserted or replaced, cut or spliced."""
    each = count // (5 * len(seeds)) + 1
    for index, seed in enumerate(seeds):
        size = len(seed)
        rows = np.tile(np.frombuffer(seed, np.uint8), (each, 1))
        bits, wild = rows.copy(), rows.copy()
        for i in range(4):
            some = np.flatnonzero(rng.random(each) < (1.0, 0.6, 0.3, 0.2)[i])
            at = rng.integers(0, size, len(some))
            bits[some, at] ^= (1 << rng.integers(0, 8, len(some))).astype(np.uint8)
            wild[some, at] = rng.integers(0, 256, len(some), np.uint8)
        ats = rng.integers(0, size + 1, (3, each)).tolist()
        blobs, lengths = rng.bytes(4 * each), rng.integers(1, 5, each).tolist()
        others = rng.integers(0, len(seeds), each).tolist()
        flat_bits, flat_wild = bits.tobytes(), wild.tobytes()
        for i, (insert_at, cut_at, splice_at) in enumerate(zip(*ats, strict=True)):
            yield flat_bits[i * size : (i + 1) * size]
            yield flat_wild[i * size : (i + 1) * size]
            yield seed[:insert_at] + blobs[4 * i : 4 * i + lengths[i]] + seed[insert_at:]
            yield flat_wild[i * size : i * size + cut_at]
            other = seeds[others[i]]
            yield seed[:splice_at] + other[min(splice_at, len(other)) if index % 2 else len(other) // 2 :]


def test_a_million_mutants_end_in_a_frame_error_or_a_valid_message() -> None:
    valid, refused, codes = 0, 0, set()
    for data in mutants(VALID, 1_000_000, np.random.default_rng(20_240)):
        try:
            message = decode(data)
        except FrameError as error:
            refused += 1
            codes.add(error.code)
        else:
            valid += 1
            encode(message)
    assert valid + refused >= 1_000_000
    assert valid > 50_000
    assert refused > 500_000
    assert codes == {"bad_frame", "bad_version"}
