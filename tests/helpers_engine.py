"""Small models and helpers for the tests of engine, runtime and command line."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np
import torch

from streamattn.context import Rows, StreamContext
from streamattn.frame import Frame
from streamattn.model import Head, Inputs, ModelConfig, StreamTransformer
from streamattn.pattern import Global, Pattern, Strided, Window

VOCAB, FEATURES = 7, 3


def small_model(*patterns: Pattern, dtype: torch.dtype = torch.float32, seed: int = 0) -> StreamTransformer:
    """Return a model of two heads that takes ids and three features."""
    heads = (Head("next", "logits", VOCAB), Head("gap", "quantiles", 2, (0.5, 0.9)))
    config = ModelConfig(
        patterns or (Pattern(Window(8), Global(first=2)), Pattern(Window(5), Strided(3, 2))),
        width=16,
        q_heads=4,
        kv_heads=2,
        head_dim=8,
        ffn=24,
        heads=heads,
        vocab=VOCAB,
        features=FEATURES,
    )
    torch.manual_seed(seed)
    return StreamTransformer(config).to(dtype).eval()


def random_events(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return ids [count] and features [count, 3]."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, VOCAB, count).astype(np.int32)
    return ids, generator.standard_normal((count, FEATURES)).astype(np.float32)


def make_frame(stream: str, sequence: int, ids: np.ndarray, features: np.ndarray, **options) -> Frame:
    """Return a frame of these events."""
    return Frame(stream, 0, sequence, 1000 + sequence, ids, features, **options)


@torch.inference_mode()
def expected_logits(model: StreamTransformer, ids: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return the head "next" of a whole stream by the parallel form."""
    inputs = Inputs(torch.from_numpy(ids.astype(np.int64))[None], torch.from_numpy(features)[None])
    return model(inputs, model.parallel_context(len(ids)))["next"][0].numpy()


@torch.inference_mode()
def stepped_logits(model: StreamTransformer, ids: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return the head "next" of a whole stream, one token after another over a cache of its own."""
    cache, outputs = model.new_cache(1), []
    for i in range(len(ids)):
        context = StreamContext(cache, Rows([0], [1]), model.config.scale)
        inputs = Inputs(torch.from_numpy(ids[i : i + 1].astype(np.int64)), torch.from_numpy(features[i : i + 1]))
        outputs.append(model(inputs, context)["next"])
        context.commit()
    return torch.cat(outputs).numpy()


async def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Return when the condition holds; fail after a generous time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition did not come true"
        await asyncio.sleep(0.002)
