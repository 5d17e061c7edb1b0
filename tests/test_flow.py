"""Sampled continuations: the right law, the model's own numbers, and nothing left behind in the live stream."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from helpers_engine import FEATURES, VOCAB, random_events, small_model

from streamattn.async_engine import AsyncEngine
from streamattn.cache import StreamCache
from streamattn.engine import Engine
from streamattn.errors import ConfigError, EngineError, StreamError
from streamattn.flow import FlowSampler, RecentFeatures
from streamattn.frame import Result
from streamattn.model import Head, ModelConfig, StreamTransformer
from streamattn.pattern import Global, Kernel, Pattern, Strided, Window

CHAIN = np.array([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.05, 0.15, 0.8]])
PATTERNS = {
    "window and long slots": (Pattern(Window(8), Global(first=2)), Pattern(Window(5), Strided(3, 2))),
    "pins and a kernel": (
        Pattern(Window(6), Global(first=1, pinned=2)),
        Pattern(Window(4), Global(first=0, pinned=2), Kernel(8, decay=0.9)),
    ),
    "no window": (Pattern(Kernel(8, decay=0.9)),),
}


def chain_model(chain: np.ndarray) -> StreamTransformer:
    """Return a model of ids alone whose next symbol is a Markov chain: the logits are the log of a row."""
    size = len(chain)
    config = ModelConfig(
        (Pattern(Window(4)),),
        width=size,
        q_heads=1,
        kv_heads=1,
        head_dim=2,
        ffn=4,
        heads=(Head("next", "logits", size),),
        vocab=size,
        norm_eps=1e-12,
    )
    model = StreamTransformer(config)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        model.embedding.weight.copy_(torch.eye(size))
        model.get_parameter("heads.next.weight").copy_(torch.from_numpy(np.log(chain).T / size**0.5))
    return model


def started(model: StreamTransformer, history: int = 30, stream: str = "a", lanes: int = 3) -> tuple[Engine, Result]:
    """Return an engine whose stream has taken some events, and its newest answer."""
    engine = Engine(model, lanes=lanes)
    handle = engine.open(stream)
    ids, features = random_events(history)
    if not model.config.features:
        return engine, handle.push(ids % model.config.vocab)
    handle.push(ids[:-1], features[:-1])
    return engine, handle.push(ids[-1], features[-1])


def recent(count: int = 200, size: int = 16) -> RecentFeatures:
    model = RecentFeatures(VOCAB, FEATURES, size)
    model.observe(*random_events(count, seed=5))
    return model


def lane_bytes(cache: StreamCache, lane: int) -> list[bytes]:
    state = [tensor for layer in cache.layers for tensor in layer.tensors()]
    return [t[lane].contiguous().numpy().tobytes() for t in (cache.position, cache.pins, *state)]


# --- the law ---------------------------------------------------------------------------------------------------------


def within_four_standard_errors(found: np.ndarray, wanted: np.ndarray, n: int) -> bool:
    return bool((np.abs(found - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / n)).all())


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_known_chain_is_drawn_with_its_exact_distribution(last: int) -> None:
    n, steps = 5000, 8
    engine = Engine(chain_model(CHAIN), lanes=1)
    result = engine.open("chain").push([0, 1, 2, 0, last])
    fan = FlowSampler(engine, n).sample(result, steps)
    found = fan.frequencies()
    for k in range(steps):
        wanted = np.linalg.matrix_power(CHAIN, k + 1)[last]
        assert within_four_standard_errors(found[k], wanted, n), k
    for k in range(steps - 1):  # steps are independent but for the chain: pairs have the product's odds
        pairs = np.bincount(fan.ids[k] * 3 + fan.ids[k + 1], minlength=9).reshape(3, 3) / n
        wanted = np.linalg.matrix_power(CHAIN, k + 1)[last][:, None] * CHAIN
        assert within_four_standard_errors(pairs, wanted, n), k


def test_temperature_flattens_the_odds() -> None:
    n = 5000
    engine = Engine(chain_model(CHAIN), lanes=1)
    result = engine.open("chain").push([2])
    for temperature in (0.5, 2.0):
        fan = FlowSampler(engine, n, temperature=temperature).sample(result, 1)
        wanted = CHAIN[2] ** (1 / temperature)
        assert within_four_standard_errors(fan.frequencies()[0], wanted / wanted.sum(), n)


def test_what_cannot_come_does_not() -> None:
    chain = np.array([[1e-300, 1.0, 1e-300], [1e-300, 1e-300, 1.0], [1.0, 1e-300, 1e-300]])
    engine = Engine(chain_model(chain), lanes=1)
    fan = FlowSampler(engine, 50).sample(engine.open("cycle").push([0]), 6)
    assert (fan.ids == np.array([1, 2, 0, 1, 2, 0])[:, None]).all()


# --- the model's own numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("history", [3, 30])  # rings that fill during the fan, and rings that have wrapped
def test_a_branch_is_what_an_engine_of_its_own_would_have_answered(name: str, history: int) -> None:
    model, steps = small_model(*PATTERNS[name]), 12
    engine, result = started(model, history)
    if engine.cache.num_pins:
        engine.cache.pin(0, history - 2)
    fan = FlowSampler(engine, 5).sample(result, steps, recent(), keep=True)
    assert fan.features is not None
    assert (fan.stream, fan.position) == ("a", history)
    for branch in range(5):
        other, _ = started(model, history, lanes=1)
        if other.cache.num_pins:
            other.cache.pin(0, history - 2)
        for step in range(steps):
            answer = other.streams["a"].push(fan.ids[step, branch], fan.features[step, branch])
            for head, found in fan.heads.items():
                np.testing.assert_allclose(found[step, branch], answer.heads[head][0], rtol=0, atol=2e-5)
    assert set(fan.heads) == {"next", "gap"}
    assert len(np.unique(fan.ids.T, axis=0)) == 5, "branches differ"


@pytest.mark.parametrize("name", PATTERNS)
def test_the_live_stream_is_untouched_bit_by_bit(name: str) -> None:
    model = small_model(*PATTERNS[name])
    engine, result = started(model)
    twin, _ = started(model)
    sampler = FlowSampler(engine, 7)
    before = [lane_bytes(engine.cache, lane) for lane in range(3)]
    held, answered = engine.cache_bytes, {name: value.copy() for name, value in result.heads.items()}
    for _ in range(3):
        sampler.sample(result, 9, recent())
    assert [lane_bytes(engine.cache, lane) for lane in range(3)] == before
    assert engine.cache_bytes == held
    assert all(np.array_equal(result.heads[name], value) for name, value in answered.items())
    for i in range(20):
        event = (x[i] for x in random_events(20, seed=9))
        pair = [e.streams["a"].push(*columns).heads for e, columns in zip((engine, twin), [[*event]] * 2, strict=True)]
        assert all(np.array_equal(pair[0][head], pair[1][head]) for head in pair[0])


# --- draws -----------------------------------------------------------------------------------------------------------


def test_a_fan_is_reproducible_whoever_else_is_there() -> None:
    model = small_model()
    engine, result = started(model)
    fan = FlowSampler(engine, 8, seed=4).sample(result, 10, recent())
    busy = Engine(model, lanes=3)
    others = [busy.open(name) for name in ("x", "y")]
    handle = busy.open("a")  # on another lane
    ids, features = random_events(30)
    again = handle.push(ids[0], features[0])
    for i in range(1, 30):
        others[i % 2].push(*(x[i] for x in random_events(30, seed=i)))
        again = handle.push(ids[i], features[i])
    sampler = FlowSampler(busy, 40, seed=4)
    sampler.sample(others[0].push(*(x[0] for x in random_events(1, seed=3))), 6, recent())
    more = sampler.sample(again, 10, recent())
    assert np.array_equal(more.ids[:, :8], fan.ids)
    assert np.array_equal(sampler.sample(again, 10, recent()).ids, more.ids)


def test_draws_differ_by_seed_stream_position_and_branch() -> None:
    uniform = np.full((3, 3), 1 / 3)
    engine = Engine(chain_model(uniform), lanes=2)

    def fan(seed: int = 0, stream: str = "a", history: int = 4) -> np.ndarray:
        result = engine.open(stream).push(np.zeros(history, np.int32))
        ids = FlowSampler(engine, 300, seed=seed).sample(result, 20).ids
        engine.streams[stream].close()
        return ids

    first = fan()
    for other in (fan(seed=1), fan(stream="b"), first[:, ::-1], np.roll(first, 1, axis=0)):
        assert 0.3 < float((first == other).mean()) < 0.37
    assert np.array_equal(first, fan())
    assert np.array_equal(first[1:], fan(history=5)[:-1])  # positions in common share their draws


# --- the fan ---------------------------------------------------------------------------------------------------------


def test_a_fan_sums_up_its_branches() -> None:
    engine, result = started(small_model())
    levels, weights = (0.1, 0.5, 0.9), (-1, 0, 1, 2, 0, 0, 0.5)
    fan = FlowSampler(engine, 32, levels=levels, walks={"move": weights}).sample(result, 7, recent(), keep=True)
    assert fan.ids.shape == (7, 32)
    assert fan.ids.dtype == np.int32
    for k in range(7):
        so_far = fan.ids[: k + 1]
        for symbol in range(VOCAB):
            ordered = np.sort((so_far == symbol).sum(axis=0))
            assert fan.counts[k, symbol].tolist() == [ordered[i] for i in (3, 15, 28)]  # the 4th, 16th, 29th of 32
        ordered = np.sort(np.array(weights)[so_far].sum(axis=0))
        assert fan.walks["move"][k].tolist() == [ordered[i] for i in (3, 15, 28)]
        medians = np.sort(np.sort(fan.heads["gap"][k], axis=1)[:, 0])  # the head's levels are 0.5 and 0.9
        np.testing.assert_allclose(fan.medians["gap"][k], medians[[3, 15, 28]], rtol=1e-6)
    assert fan.frequencies().shape == (7, VOCAB)
    np.testing.assert_allclose(fan.frequencies().sum(axis=1), 1)


def test_a_median_between_two_levels_is_interpolated_and_one_outside_is_not_made_up() -> None:
    def with_levels(*levels: float) -> StreamTransformer:
        config = chain_model(CHAIN).config
        heads = (*config.heads, Head("wait", "quantiles", len(levels), levels))
        fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
        torch.manual_seed(2)
        return StreamTransformer(ModelConfig(**{**fields, "heads": heads}))

    engine = Engine(with_levels(0.2, 0.4, 0.8), lanes=1)
    fan = FlowSampler(engine, 1, levels=(0.5,)).sample(engine.open("a").push([1]), 3, keep=True)
    wanted = [np.interp(0.5, (0.2, 0.4, 0.8), np.sort(row[0])) for row in fan.heads["wait"]]
    np.testing.assert_allclose(fan.medians["wait"][:, 0], wanted, rtol=1e-6)
    engine = Engine(with_levels(0.6, 0.9), lanes=1)
    assert FlowSampler(engine, 2).sample(engine.open("a").push([1]), 3).medians == {}


def test_one_branch_of_one_event() -> None:
    engine, result = started(small_model())
    fan = FlowSampler(engine, 1).sample(result, 1, recent())
    assert fan.ids.shape == (1, 1)
    assert fan.counts[0, fan.ids[0, 0]].tolist() == [1] * 5
    assert fan.counts.sum() == 5
    assert fan.features is None
    assert fan.heads == {}


def test_memory_is_that_of_n_lanes_and_stays() -> None:
    engine, result = started(small_model())
    sampler = FlowSampler(engine, 12)
    assert sampler.cache_bytes == 12 * engine.cache.memory_bytes // 3
    storages = [t.data_ptr() for layer in sampler.cache.layers for t in layer.tensors()]
    for steps in (1, 20):
        sampler.sample(result, steps, recent())
    assert [t.data_ptr() for layer in sampler.cache.layers for t in layer.tensors()] == storages


# --- asyncio ---------------------------------------------------------------------------------------------------------


async def test_from_asyncio_on_the_engines_thread_or_only_the_copy() -> None:
    model = small_model()
    ids, features = random_events(30)
    engine, result = started(model)
    wanted = FlowSampler(engine, 6).sample(result, 15, recent()).ids
    async with AsyncEngine(Engine(model, lanes=2)) as running:
        stream = await running.open("a")
        await stream.push(ids[:29], features[:29])
        answer = await stream.push(ids[29], features[29])
        sampler = FlowSampler(running.engine, 6)
        fan = await running.call(lambda: sampler.sample(answer, 15, recent()))
        await running.call(lambda: sampler.fork(answer))
        drawing = asyncio.create_task(asyncio.to_thread(sampler.draw, 15, recent()))
        for i in range(30):  # the live stream goes on meanwhile
            await stream.push(ids[i], features[i])
        later = await drawing
        with pytest.raises(ConfigError, match="steps"):
            await running.call(lambda: sampler.sample(answer, 0, recent()))
    assert later.position == 30
    for found in (fan, later):
        assert np.array_equal(found.ids, wanted)


# --- features --------------------------------------------------------------------------------------------------------


def test_recent_features_are_those_of_a_recent_event_of_the_same_symbol() -> None:
    ids, features = random_events(400, seed=5)
    model = recent(400, size=16)
    every = np.arange(0, 1, 1 / 320)
    for symbol in range(VOCAB):
        drawn = model.draw(np.full(len(every), symbol), every)
        kept = features[ids == symbol][-16:]
        assert len(kept) == 16
        rows, counts = np.unique(drawn, axis=0, return_counts=True)
        assert np.array_equal(rows, np.unique(kept, axis=0))
        assert set(counts) == {20}
    assert model.borrowed == 0


def test_observed_one_by_one_or_at_once_is_the_same() -> None:
    ids, features = random_events(100)
    whole, single = RecentFeatures(VOCAB, FEATURES, 4), RecentFeatures(VOCAB, FEATURES, 4)
    whole.observe(ids, features)
    for i in range(100):
        single.observe(ids[i], features[i])
    asked = np.arange(70) % VOCAB, np.random.default_rng(0).random(70)
    assert np.array_equal(whole.draw(*asked), single.draw(*asked))


def test_a_symbol_never_seen_borrows_and_counts_it() -> None:
    model = RecentFeatures(3, 1, 2)
    with pytest.raises(ConfigError, match="observe first"):
        model.draw(np.array([0]), np.array([0.5]))
    model.observe([0, 0, 0, 2], [[9.0], [1.0], [2.0], [3.0]])
    drawn = model.draw(np.array([1, 1, 1, 2]), np.array([0.0, 0.4, 0.99, 0.99]))
    assert drawn.ravel().tolist() == [2.0, 1.0, 3.0, 3.0]  # slots: 9 has made way for 2
    assert model.borrowed == 3


# --- errors ----------------------------------------------------------------------------------------------------------


def test_impossible_samplers_are_refused() -> None:
    engine, _ = started(small_model())
    for options, named in [
        ({"branches": 0}, "branches"),
        ({"branches": 2, "temperature": 0.0}, "temperature"),
        ({"branches": 2, "temperature": float("nan")}, "temperature"),
        ({"branches": 2, "levels": ()}, "levels"),
        ({"branches": 2, "levels": (0.5, 0.4)}, "levels"),
        ({"branches": 2, "levels": (0.5, 1.0)}, "levels"),
        ({"branches": 2, "walks": {"move": (1, 2)}}, "move"),
        ({"branches": 2, "walks": {"move": (float("nan"),) * VOCAB}}, "move"),
    ]:
        with pytest.raises(ConfigError, match=named):
            FlowSampler(engine, **options)
    config = chain_model(CHAIN).config
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    other = StreamTransformer(ModelConfig(**{**fields, "heads": (Head("sign", "classes", 3),)}))
    with pytest.raises(ConfigError, match="next"):
        FlowSampler(Engine(other, lanes=1), 2)


def test_impossible_draws_are_refused() -> None:
    engine, result = started(small_model())
    sampler = FlowSampler(engine, 3)
    with pytest.raises(EngineError, match="fork"):
        sampler.draw(2, recent())
    with pytest.raises(ConfigError, match="steps"):
        sampler.sample(result, 0, recent())
    with pytest.raises(ConfigError, match="features"):
        sampler.sample(result, 2)
    silent = engine.streams["a"].push(*random_events(1), answer="none")
    with pytest.raises(ConfigError, match="head 'next'"):
        sampler.sample(silent, 2, recent())
    with pytest.raises(StreamError, match="newest"):
        sampler.sample(result, 2, recent())
    answer = engine.streams["a"].push(*random_events(1))
    sampler.sample(answer, 2, recent())
    with pytest.raises(EngineError, match="fork"):  # used up
        sampler.draw(2, recent())
    engine.streams["a"].close()
    with pytest.raises(StreamError, match="not open"):
        sampler.sample(answer, 2, recent())


def test_features_that_do_not_fit_are_refused() -> None:
    engine, result = started(small_model())
    sampler = FlowSampler(engine, 3)

    class Made:
        def __init__(self, value: np.ndarray) -> None:
            self.value = value

        def draw(self, ids: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
            return self.value

    for value in (np.zeros((3, FEATURES + 1)), np.zeros((2, FEATURES)), np.full((3, FEATURES), np.nan)):
        with pytest.raises(ConfigError, match=r"FeatureModel\.draw"):
            sampler.sample(result, 2, Made(value))
    plain = Engine(chain_model(CHAIN), lanes=1)
    with pytest.raises(ConfigError, match="expected none"):
        FlowSampler(plain, 2).sample(plain.open("a").push([0]), 2, recent())
    for ids, features in [([0], [[1.0, 2.0]]), ([VOCAB], [[0.0] * 3]), ([0, 1], [[0.0] * 3]), ([-1], [[0.0] * 3])]:
        with pytest.raises(ConfigError, match="observe"):
            recent().observe(ids, features)
    with pytest.raises(ConfigError, match="sizes"):
        RecentFeatures(3, 2, 0)


def test_a_broken_model_is_reported() -> None:
    model = small_model()
    engine, result = started(model)
    sampler = FlowSampler(engine, 3)
    with torch.no_grad():
        model.get_parameter("heads.gap.weight").fill_(torch.nan)
    with pytest.raises(EngineError, match="NaN"):
        sampler.sample(result, 2, recent())


def test_lanes_are_copied_between_caches_of_one_shape_only() -> None:
    model = small_model()
    target, source = model.new_cache(2), small_model(Pattern(Window(3))).new_cache(2)
    with pytest.raises(ConfigError, match="copy_lane_from"):
        target.copy_lane_from(source, 0, slice(None))
    with pytest.raises(ConfigError, match="copy_lane_from"):
        target.copy_lane_from(small_model(dtype=torch.float64).new_cache(2), 0, slice(None))
