"""The whole model: streaming equals parallel, and equals what transformers computes with the same weights."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from streamattn.cache import StreamCache
from streamattn.context import Rows, StreamContext
from streamattn.errors import ConfigError
from streamattn.model import Head, Inputs, ModelConfig, StreamTransformer
from streamattn.pattern import Global, Kernel, Pattern, Strided, Window

VOCAB = 50
BLOCK_WEIGHTS = ("attention_norm", "qkv", "output", "mlp_norm", "gate_up", "down")


def new_model(
    *patterns: Pattern, features: int = 0, vocab: int = VOCAB, dtype: torch.dtype = torch.float64
) -> StreamTransformer:
    heads = (Head("logits", "logits", vocab or 7), Head("spread", "quantiles", 3, (0.1, 0.5, 0.9)))
    config = ModelConfig(
        patterns, width=24, q_heads=4, kv_heads=2, head_dim=8, ffn=40, heads=heads, vocab=vocab, features=features
    )
    torch.manual_seed(0)
    model = StreamTransformer(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # hot enough that attention matters and logits are of order one
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5 * 1.3)
    return model


def run(model: StreamTransformer, inputs: Inputs, sizes: list[int], cache: StreamCache, phase: int = 0) -> Tensor:
    """Return the logits of one stream on lane 0, in steps of the given sizes."""
    outputs, at = [], 0
    for size in sizes:
        context = StreamContext(cache, Rows([0], [size]), model.config.scale, phase)
        part = Inputs(
            None if inputs.ids is None else inputs.ids[at : at + size],
            None if inputs.features is None else inputs.features[at : at + size],
        )
        outputs.append(model(part, context)["logits"])
        context.commit()
        at += size
    return torch.cat(outputs)


def mixed_sizes(total: int, seed: int = 0) -> list[int]:
    cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, total), total // 6, replace=False))
    return [int(b - a) for a, b in pairwise([0, *cuts, total])]


PATTERNS = {
    "window": [Pattern(Window(8))],
    "window+global": [Pattern(Window(8), Global(first=3))],
    "window+strided": [Pattern(Window(6), Strided(5, 3, 2))],
    "window+global+strided": [Pattern(Window(5), Global(first=2), Strided(4, 6))],
    "schedule": [Pattern(Window(4)), Pattern(Window(9), Global(first=1), Strided(3, 2))],
    "strided": [Pattern(Strided(4, 3, 2))],
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@torch.inference_mode()
def test_streaming_equals_parallel(name: str, dtype: torch.dtype) -> None:
    model = new_model(*PATTERNS[name], Pattern(Window(3), Kernel(16, decay=0.9)), features=3, dtype=dtype)
    inputs = Inputs(torch.randint(VOCAB, (90,)), torch.randn(90, 3))
    assert inputs.ids is not None
    assert inputs.features is not None
    whole = model(Inputs(inputs.ids[None], inputs.features[None]), model.parallel_context(90))["logits"][0]
    assert 0.5 < whole.std() < 3
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5}[dtype]
    for sizes in ([1] * 90, mixed_sizes(90), [90]):
        found = run(model, inputs, sizes, model.new_cache(1))
        torch.testing.assert_close(found, whole, rtol=0, atol=tolerance)


@torch.inference_mode()
def test_equals_mistral_with_its_sliding_window() -> None:
    model = new_model(Pattern(Window(8)), Pattern(Window(8)), dtype=torch.float32)
    shape = hugging_face_shape(model)
    peer = MistralForCausalLM(MistralConfig(sliding_window=8, **shape)).eval()
    peer.set_attn_implementation("sdpa")
    copy_weights(model, peer)
    ids = torch.randint(VOCAB, (80,))  # ten windows
    wanted = peer(ids[None]).logits[0]
    for sizes in ([1] * 80, mixed_sizes(80)):
        found = run(model, Inputs(ids), sizes, model.new_cache(1))
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "strided"])  # there some queries see nothing
@torch.inference_mode()
def test_equals_llama_with_an_explicit_mask(name: str) -> None:
    pattern = PATTERNS[name][-1]
    model = new_model(pattern, pattern, dtype=torch.float32)
    peer = LlamaForCausalLM(LlamaConfig(**hugging_face_shape(model))).eval()
    peer.set_attn_implementation("eager")
    copy_weights(model, peer)
    N = 10 * max(pattern.window, 6)
    ids = torch.randint(VOCAB, (N,))
    seen = torch.tensor([[oracle.live(pattern, t, j, {}) == "index" for j in range(N)] for t in range(N)])
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)  # additive floats: booleans are not masked by eager
    wanted = peer(ids[None], attention_mask=mask[None, None]).logits[0]
    for sizes in ([1] * N, mixed_sizes(N)):
        found = run(model, Inputs(ids), sizes, model.new_cache(1))
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.float64, 1e-6)], ids=str)
@torch.inference_mode()
def test_outputs_do_not_depend_on_the_rotary_phase(dtype: torch.dtype, tolerance: float) -> None:
    model = new_model(Pattern(Window(16), Global(first=2)), Pattern(Window(8), Kernel(8)), dtype=dtype)
    inputs = Inputs(torch.randint(VOCAB, (100,)))
    wanted = run(model, inputs, mixed_sizes(100), model.new_cache(1))
    for phase in (10**6, 10**9, 2**45):
        found = run(model, inputs, mixed_sizes(100, seed=1), model.new_cache(1), phase)
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def test_training_through_chunks_has_the_gradient_of_the_parallel_form() -> None:
    model = new_model(Pattern(Window(5), Global(first=2), Strided(3, 2), Kernel(6, decay=0.9)))
    ids = torch.randint(VOCAB, (2, 30))
    whole = model(Inputs(ids), model.parallel_context(30))["logits"]
    whole.square().mean().backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    context = StreamContext(model.new_cache(2), Rows([0, 1], [30, 30]), model.config.scale)
    model(Inputs(ids.flatten()), context)["logits"].square().mean().backward()
    context.commit()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@torch.inference_mode()
def test_memory_is_the_same_after_a_million_tokens() -> None:
    pattern = Pattern(Window(16), Global(first=2), Strided(8, 3))
    config = ModelConfig((pattern,), 4, 1, 1, 4, 4, (Head("logits", "logits", 5),), vocab=5)
    model = StreamTransformer(config)
    cache = model.new_cache(1)
    ids = torch.randint(5, (250,))
    sizes: dict[int, int] = {}
    storages = set()
    while (taken := int(cache.position[0])) < 1_000_000:
        context = StreamContext(cache, Rows([0], [len(ids)]), config.scale)
        model(Inputs(ids), context)
        context.commit()
        if taken + len(ids) in (1_000, 10_000, 100_000, 1_000_000):
            sizes[taken + len(ids)] = cache.allocated_bytes()
            storages.add(tuple(t.untyped_storage().data_ptr() for layer in cache.layers for t in layer.tensors()))
    assert sizes == dict.fromkeys((1_000, 10_000, 100_000, 1_000_000), cache.memory_bytes)
    assert len(storages) == 1


def test_inputs_that_do_not_fit_are_named() -> None:
    model = new_model(Pattern(Window(4)), features=3)
    context = StreamContext(model.new_cache(1), Rows([0], [1]), 1.0)
    with pytest.raises(ConfigError, match="inputs: expected ids and features, found ids"):
        model(Inputs(torch.zeros(1, dtype=torch.int64)), context)
    with pytest.raises(ConfigError, match="features: expected 3 an event, found 2"):
        model(Inputs(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2)), context)
    with pytest.raises(ConfigError, match="Inputs: expected ids or features, found neither"):
        Inputs()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width: expected >= 1, found 0"),
        ({"q_heads": 3}, "q_heads: expected a multiple of kv_heads = 2, found 3"),
        ({"head_dim": 7}, "head_dim: expected an even number, found 7"),
        ({"vocab": 0}, "vocab, features: expected at least one > 0"),
        ({"patterns": ()}, "patterns: expected one a layer, found none"),
        ({"heads": ()}, "heads: expected at least one, with distinct names"),
    ],
)
def test_shapes_that_cannot_work_are_refused(change: dict, message: str) -> None:
    good = {"patterns": (Pattern(Window(2)),), "width": 8, "q_heads": 4, "kv_heads": 2, "head_dim": 4, "ffn": 8}
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{**good, "vocab": 5, "heads": (Head("logits", "logits", 5),), **change})


def hugging_face_shape(model: StreamTransformer) -> dict:
    c = model.config
    return {
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.q_heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
    }


@torch.no_grad()
def copy_weights(model: StreamTransformer, peer: torch.nn.Module) -> None:
    """Give the peer our random weights."""
    c = model.config
    ours = dict(model.named_parameters())
    state: dict[str, Tensor] = {
        "model.embed_tokens.weight": ours["embedding.weight"],
        "model.norm.weight": ours["final_norm.weight"],
        "lm_head.weight": ours["heads.logits.weight"],
    }
    for i in range(c.layers):
        block = {name: ours[f"blocks.{i}.{name}.weight"] for name in BLOCK_WEIGHTS}
        prefix = f"model.layers.{i}."
        sizes = [c.q_heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
        for name, weight in zip("qkv", block["qkv"].split(sizes), strict=True):
            state[f"{prefix}self_attn.{name}_proj.weight"] = weight
        gate, up = block["gate_up"].chunk(2)
        state |= {
            f"{prefix}self_attn.o_proj.weight": block["output"],
            f"{prefix}mlp.gate_proj.weight": gate,
            f"{prefix}mlp.up_proj.weight": up,
            f"{prefix}mlp.down_proj.weight": block["down"],
            f"{prefix}input_layernorm.weight": block["attention_norm"],
            f"{prefix}post_attention_layernorm.weight": block["mlp_norm"],
        }
    peer.load_state_dict({name: weight.float() for name, weight in state.items()})
