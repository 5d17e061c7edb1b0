"""Streaming equals parallel equals brute force: the property the project stands on."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamattn.cache import StreamCache
from streamattn.context import ParallelContext, Rows, StreamContext
from streamattn.pattern import Global, Kernel, Part, Pattern, Strided, Window

HEADS = {"q_heads": 4, "kv_heads": 2, "head_dim": 8}
SCALE = HEADS["head_dim"] ** -0.5
THETA = 10_000.0
# float64: the project's contract. float32: the same for unit-variance outputs, which random inputs here have.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


@st.composite
def patterns(draw: st.DrawFn, pinned: bool = False) -> Pattern:
    parts: list[Part] = []
    if pinned or draw(st.booleans()) or draw(st.booleans()):
        parts.append(Window(draw(st.integers(1, 13))))
    middle: list[Part] = []
    if pinned or draw(st.booleans()):
        middle.append(Global(draw(st.integers(0 if pinned else 1, 5)), pinned=draw(st.integers(1, 3)) if pinned else 0))
    for _ in range(draw(st.integers(0, 2))):
        every = draw(st.integers(1, 7))
        middle.append(Strided(every, draw(st.integers(1, 4)), draw(st.integers(1, every))))
    parts += draw(st.permutations(middle))
    if not parts or draw(st.booleans()):
        parts.append(Kernel(draw(st.integers(1, 12)), decay=draw(st.sampled_from([1.0, 0.9, 0.5])), seed=3))
    return Pattern(*parts)


def random_qkv(seed: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = {"generator": generator, "dtype": torch.float64}
    q = torch.randn(tokens, HEADS["q_heads"], HEADS["head_dim"], **shape)
    k = torch.randn(tokens, HEADS["kv_heads"], HEADS["head_dim"], **shape)
    v = torch.randn(tokens, HEADS["kv_heads"], HEADS["head_dim"], **shape)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def new_cache(
    layers: list[Pattern], lanes: int, dtype: torch.dtype, marks: int = 0, poison: bool = True
) -> StreamCache:
    cache = StreamCache(
        layers, lanes=lanes, kv_heads=HEADS["kv_heads"], head_dim=HEADS["head_dim"], dtype=dtype, marks=marks
    )
    if poison:  # nothing may depend on what unwritten memory holds
        for layer in cache.layers:
            layer.k.fill_(torch.nan)
            layer.v.fill_(torch.nan)
            layer.expire.fill_(2**62)
            for tensor in layer.kernel or ():
                tensor.fill_(torch.nan)
    return cache


def expected(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, layer: int = 0, pins: dict | None = None) -> Tensor:
    unrotated = q.double().numpy(), k.double().numpy()
    rotated = [oracle.rotate(x, THETA) for x in unrotated]
    omega = pattern.kernel.omega(layer, HEADS["kv_heads"], HEADS["head_dim"]).numpy() if pattern.kernel else None
    return torch.from_numpy(
        oracle.attention(pattern, *rotated, v.double().numpy(), SCALE, unrotated, omega, pins)  # type: ignore[call-arg]
    )


def stream(cache: StreamCache, lane: int, q: Tensor, k: Tensor, v: Tensor, sizes: list[int], layer: int = 0) -> Tensor:
    outputs, at = [], 0
    for size in sizes:
        context = StreamContext(cache, Rows([lane], [size]), SCALE)
        outputs.append(context.attend(layer, q[at : at + size], k[at : at + size], v[at : at + size]))
        context.commit()
        at += size
    return torch.cat(outputs)


def partition(generator: np.random.Generator, total: int, largest: int) -> list[int]:
    sizes = []
    while total:
        size = min(total, int(generator.integers(1, largest + 1)) if generator.random() < 0.7 else 1)
        sizes.append(size)
        total -= size
    return sizes


def check(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=60, deadline=None)
@given(pattern=patterns(), seed=st.integers(0, 2**31), tokens=st.integers(1, 70))
def test_any_chunking_equals_brute_force(dtype: torch.dtype, pattern: Pattern, seed: int, tokens: int) -> None:
    q, k, v = random_qkv(seed, tokens, dtype)
    wanted = expected(pattern, q, k, v)
    generator = np.random.default_rng(seed)
    largest = 4 * max(pattern.window, 4)
    for sizes in ([1] * tokens, [tokens], partition(generator, tokens, largest)):
        check(stream(new_cache([pattern], 1, dtype), 0, q, k, v, sizes), wanted, dtype)
    shape = HEADS["kv_heads"], HEADS["head_dim"]
    for block in (128, 7):
        context = ParallelContext([pattern], tokens, *shape, dtype, THETA, SCALE, block=block)
        check(context.attend(0, q[None], k[None], v[None])[0], wanted, dtype)


@settings(max_examples=40, deadline=None)
@given(pattern=patterns(), seed=st.integers(0, 2**31), data=st.data())
def test_desynchronised_lanes_in_mixed_steps(pattern: Pattern, seed: int, data: st.DataObject) -> None:
    lanes = 4
    generator = np.random.default_rng(seed)
    streams = [random_qkv(seed + lane, int(generator.integers(1, 60)), torch.float64) for lane in range(lanes)]
    cache = new_cache([pattern], lanes, torch.float64)
    outputs: list[list[Tensor]] = [[] for _ in range(lanes)]
    at = [0] * lanes
    while any(at[lane] < len(streams[lane][0]) for lane in range(lanes)):
        ready = [lane for lane in range(lanes) if at[lane] < len(streams[lane][0]) and generator.random() < 0.7]
        sizes = {
            lane: min(int(generator.choice([1, 1, 1, 2, 5, 30])), len(streams[lane][0]) - at[lane]) for lane in ready
        }
        order = sorted(ready, key=lambda lane: (sizes[lane] > 1, generator.random()))
        if not order:
            continue
        idle = {lane: lane_bytes(cache, lane) for lane in range(lanes) if lane not in ready}
        pieces = [[x[at[lane] : at[lane] + sizes[lane]] for x in streams[lane]] for lane in order]
        context = StreamContext(cache, Rows(order, [sizes[lane] for lane in order]), SCALE)
        found = context.attend(0, *(torch.cat(parts) for parts in zip(*pieces, strict=True)))
        context.commit()
        for lane, part in zip(order, found.split([sizes[lane] for lane in order]), strict=True):
            outputs[lane].append(part)
            at[lane] += sizes[lane]
        assert all(lane_bytes(cache, lane) == before for lane, before in idle.items()), "an idle lane changed"
    for lane in range(lanes):
        check(torch.cat(outputs[lane]), expected(pattern, *streams[lane]), torch.float64)


def lane_bytes(cache: StreamCache, lane: int) -> list[bytes]:
    state = [t for layer in cache.layers for t in layer.tensors()]
    return [t[lane].contiguous().numpy().tobytes() for t in (cache.position, cache.pins, *state)]


@settings(max_examples=30, deadline=None)
@given(pattern=patterns(), seed=st.integers(0, 2**31), tokens=st.integers(2, 50), data=st.data())
def test_the_future_does_not_reach_back(pattern: Pattern, seed: int, tokens: int, data: st.DataObject) -> None:
    q, k, v = random_qkv(seed, tokens, torch.float32)
    cut = data.draw(st.integers(1, tokens - 1))
    other_q, other_k, other_v = (x.clone() for x in (q, k, v))
    for x in (other_q, other_k, other_v):
        x[cut:] = 1e4 * torch.randn(x[cut:].shape, generator=torch.Generator().manual_seed(seed))
    one_by_one = [1] * tokens
    before = stream(new_cache([pattern], 1, torch.float32), 0, q, k, v, one_by_one)
    after = stream(new_cache([pattern], 1, torch.float32), 0, other_q, other_k, other_v, one_by_one)
    assert torch.equal(before[:cut], after[:cut])  # the one-token form: bit by bit
    chunked = stream(new_cache([pattern], 1, torch.float32), 0, other_q, other_k, other_v, [tokens])
    torch.testing.assert_close(chunked[:cut], before[:cut], rtol=0, atol=TOLERANCE[torch.float32])


@settings(max_examples=30, deadline=None)
@given(pattern=patterns(), seed=st.integers(0, 2**31))
def test_a_lane_passes_to_another_stream_uncleared(pattern: Pattern, seed: int) -> None:
    q, k, v = random_qkv(seed, 45, torch.float64)
    cache = new_cache([pattern], 1, torch.float64)
    stream(cache, 0, q, k, v, [1] * 25 + [20])
    cache.reset(0)
    sizes = partition(np.random.default_rng(seed), 45, 20)
    q, k, v = random_qkv(seed + 1, 45, torch.float64)
    check(stream(cache, 0, q, k, v, sizes), expected(pattern, q, k, v), torch.float64)


@settings(max_examples=30, deadline=None)
@given(pattern=patterns(pinned=True), seed=st.integers(0, 2**31), data=st.data())
def test_rollback_continues_as_if_nothing_had_happened(pattern: Pattern, seed: int, data: st.DataObject) -> None:
    q, k, v = random_qkv(seed, 40, torch.float64)
    cut = data.draw(st.integers(1, 39))
    cache = new_cache([pattern], 2, torch.float64, marks=1)
    stream(cache, 1, q[:cut], k[:cut], v[:cut], [1] * cut)
    cache.mark(1, 0)
    before = lane_bytes(cache, 1)
    other_q, other_k, other_v = random_qkv(seed + 1, 30, torch.float64)
    stream(cache, 1, other_q, other_k, other_v, [30])
    cache.pin(1, int(cache.position[1]) - 1)
    cache.rollback(1, 0)
    assert lane_bytes(cache, 1) == before
    rest = stream(cache, 1, q[cut:], k[cut:], v[cut:], [1] * (40 - cut))
    check(rest, expected(pattern, q, k, v)[cut:], torch.float64)


@settings(max_examples=60, deadline=None)
@given(pattern=patterns(pinned=True), seed=st.integers(0, 2**31))
def test_pins_are_seen_until_unpinned(pattern: Pattern, seed: int) -> None:
    tokens = 60
    q, k, v = random_qkv(seed, tokens, torch.float64)
    generator = np.random.default_rng(seed)
    cache = new_cache([pattern], 1, torch.float64)
    pins: dict[int, tuple[int, float]] = {}
    outputs, at = [], 0
    while at < tokens:
        size = min(int(generator.choice([1, 1, 2, 7, 20])), tokens - at)
        outputs.append(stream(cache, 0, q[at : at + size], k[at : at + size], v[at : at + size], [size]))
        at += size
        current = [p for p, (_, until) in pins.items() if until == np.inf]
        if current and generator.random() < 0.3:
            gone = int(generator.choice(current))
            cache.unpin(0, gone)
            pins[gone] = (pins[gone][0], at)
        fresh = int(generator.integers(max(0, at - pattern.window), at))
        if fresh not in pins and -1 in cache.pins[0].tolist():
            cache.pin(0, fresh)
            pins[fresh] = (at, np.inf)
    check(torch.cat(outputs), expected(pattern, q, k, v, pins=pins), torch.float64)


@settings(max_examples=40, deadline=None)
@given(pattern=patterns(pinned=True), seed=st.integers(0, 2**31), tokens=st.integers(1, 60))
def test_resident_says_what_the_last_token_sees(pattern: Pattern, seed: int, tokens: int) -> None:
    q, k, v = random_qkv(seed, tokens, torch.float64)
    cache = new_cache([pattern], 1, torch.float64)
    stream(cache, 0, q, k, v, partition(np.random.default_rng(seed), tokens, 20))
    found = [cache.resident(0, j) for j in range(-1, tokens + 2)]
    assert found == [oracle.live(pattern, tokens - 1, j, {}) == "index" for j in range(-1, tokens + 2)]


@settings(max_examples=100, deadline=None)
@given(pattern=patterns(pinned=True), tokens=st.integers(1, 80))
def test_every_key_belongs_to_one_part(pattern: Pattern, tokens: int) -> None:
    j = torch.arange(tokens)
    routes = pattern.routes(j)
    for key in range(tokens):
        t = tokens
        how = oracle.live(pattern, t, key, {})
        assert (key <= t < int(routes.expire[key])) == (how == "index")
        absorbed = bool(routes.to_kernel[key]) and t - key >= pattern.window
        assert absorbed == (how == "kernel")


def test_memory_is_what_was_promised_to_the_byte() -> None:
    layers = [
        Pattern(Window(7), Global(first=3, pinned=2), Strided(4, 3, 2), Kernel(9)),
        Pattern(Window(16)),
        Pattern(Kernel(5, decay=0.5)),
    ]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        cache = new_cache(layers, lanes=3, dtype=dtype, marks=2)
        assert cache.allocated_bytes() == cache.memory_bytes + cache.spare_bytes
        assert cache.memory_bytes == 3 * sum(p.memory_bytes(2, 8, dtype) for p in layers) + 3 * (1 + 2) * 8
