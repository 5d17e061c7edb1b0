"""StreamTransformer: a causal pre-norm decoder for token ids, float features, or both; any named heads out.

RMSNorm, grouped-query attention with rotary positions, SwiGLU: the llama family. One `forward` serves training,
prefill and decode; the context that is passed in decides how attention is done and owns all state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from streamattn.cache import StreamCache
from streamattn.context import AttentionContext, ParallelContext
from streamattn.errors import ConfigError
from streamattn.pattern import Pattern

HeadKind = Literal["logits", "quantiles", "classes"]


@dataclass(frozen=True)
class Head:
    """A named output of the model.

    Attributes:
        name: its key in the results.
        kind: "logits" over the next token id, "classes" over something else, or "quantiles" of a real number.
        size: number of logits or classes; for quantiles the number of levels.
        levels: the quantiles' levels in (0, 1), rising; empty for other kinds.
    """

    name: str
    kind: HeadKind
    size: int
    levels: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("logits", "quantiles", "classes"):
            raise ConfigError(f"Head.kind: expected logits, quantiles or classes, found {self.kind!r}")
        if not self.name or self.size < 1:
            raise ConfigError(f"Head: expected a name and size >= 1, found {self.name!r} and {self.size}")
        rising = all(low < high for low, high in pairwise((0.0, *self.levels, 1.0)))
        if self.kind == "quantiles" and (len(self.levels) != self.size or not rising):
            raise ConfigError(f"Head.levels: expected {self.size} rising levels in (0, 1), found {self.levels}")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a StreamTransformer.

    Attributes:
        patterns: one a layer; their number is the number of layers.
        width: E. kv_heads divides q_heads. head_dim is even. ffn is SwiGLU's inner width.
        vocab: number of token ids, 0 for none. features: floats an event, 0 for none. At least one of the two.
        heads: at least one, with distinct names.
    """

    patterns: tuple[Pattern, ...]
    width: int
    q_heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    heads: tuple[Head, ...]
    vocab: int = 0
    features: int = 0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("width", "q_heads", "kv_heads", "head_dim", "ffn"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected >= 1, found {getattr(self, name)}")
        if not self.patterns:
            raise ConfigError("patterns: expected one a layer, found none")
        if self.q_heads % self.kv_heads:
            raise ConfigError(f"q_heads: expected a multiple of kv_heads = {self.kv_heads}, found {self.q_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim: expected an even number, found {self.head_dim}")
        if self.vocab < 0 or self.features < 0 or self.vocab + self.features == 0:
            raise ConfigError(f"vocab, features: expected at least one > 0, found {self.vocab} and {self.features}")
        names = [head.name for head in self.heads]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"heads: expected at least one, with distinct names, found {names}")

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.patterns)

    @property
    def scale(self) -> float:
        """Factor of the attention logits."""
        return self.head_dim**-0.5


@dataclass(frozen=True, eq=False)
class Inputs:
    """Events of a step: `ids` [...] int64 and / or `features` [..., d] float; `...` is [N] packed or [B, N]."""

    ids: Tensor | None = None
    features: Tensor | None = None
    shape: torch.Size = field(init=False)

    def __post_init__(self) -> None:
        shape = self.ids.shape if self.ids is not None else None
        if self.features is not None:
            shape = self.features.shape[:-1]
        if shape is None:
            raise ConfigError("Inputs: expected ids or features, found neither")
        object.__setattr__(self, "shape", shape)


class _Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.config = layer, config
        queries, keys = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.qkv = nn.Linear(config.width, queries + 2 * keys, bias=False)
        self.output = nn.Linear(queries, config.width, bias=False)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.gate_up = nn.Linear(config.width, 2 * config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        c = self.config
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, c.head_dim))
        q, k, v = heads.split((c.q_heads, c.kv_heads, c.kv_heads), dim=-2)
        x = x + self.output(context.attend(self.layer, q, k, v).flatten(-2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * up)


class StreamTransformer(nn.Module):
    """A causal decoder whose attention state lives outside it.

    Args:
        config: its shape.
        mean, std: [features] normalisation of the float features, stored with the weights; default 0 and 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, mean: Tensor | None = None, std: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        if config.vocab:
            self.embedding = nn.Embedding(config.vocab, config.width)
        if config.features:
            self.feature_input = nn.Linear(config.features, config.width, bias=False)
            self.register_buffer("mean", torch.zeros(config.features) if mean is None else mean)
            self.register_buffer("std", torch.ones(config.features) if std is None else std)
        self.blocks = nn.ModuleList(_Block(config, layer) for layer in range(config.layers))
        self.final_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.heads = nn.ModuleDict({head.name: nn.Linear(config.width, head.size, bias=False) for head in config.heads})

    def forward(self, inputs: Inputs, context: AttentionContext, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Return the heads' outputs: name -> [..., size].

        Args:
            inputs: ids and / or features, as the config says.
            context: attends, and owns positions and state.
            rows: [R] int64 indices of packed tokens to answer; None answers all.
        """
        x = self.embed(inputs)
        for block in self.blocks:
            x = block(x, context)
        if rows is not None:
            x = x[rows]
        x = self.final_norm(x)
        return {name: head(x) for name, head in self.heads.items()}

    def embed(self, inputs: Inputs) -> Tensor:
        """Return [..., E] of ids plus normalised features.

        Raises:
            ConfigError: ids or features are missing, unexpected, or of the wrong width.
        """
        config = self.config
        if (inputs.ids is None) == bool(config.vocab) or (inputs.features is None) == bool(config.features):
            raise ConfigError(f"inputs: expected {self._wants()}, found {_given(inputs)}")
        x = self.embedding(inputs.ids) if inputs.ids is not None else None
        if inputs.features is None:
            assert x is not None
            return x
        if inputs.features.shape[-1] != config.features:
            raise ConfigError(f"features: expected {config.features} an event, found {inputs.features.shape[-1]}")
        features = self.feature_input((inputs.features.to(self.dtype) - self.mean) / self.std)
        return features if x is None else x + features

    def _wants(self) -> str:
        wants = [name for name, size in (("ids", self.config.vocab), ("features", self.config.features)) if size]
        return " and ".join(wants)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.final_norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.final_norm.weight.device

    def new_cache(self, lanes: int, marks: int = 0) -> StreamCache:
        """Return an empty cache for `lanes` streams of this model, with `marks` spare rows."""
        c = self.config
        return StreamCache(
            c.patterns,
            lanes=lanes,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            dtype=self.dtype,
            marks=marks,
            rope_theta=c.rope_theta,
            device=self.device,
        )

    def parallel_context(self, tokens: int) -> ParallelContext:
        """Return the context of the parallel form for inputs of [B, tokens] from position 0."""
        c = self.config
        return ParallelContext(
            c.patterns, tokens, c.kv_heads, c.head_dim, self.dtype, c.rope_theta, c.scale, self.device
        )


def _given(inputs: Inputs) -> str:
    given = [name for name in ("ids", "features") if getattr(inputs, name) is not None]
    return " and ".join(given)


def head_from_config(data: dict[str, Any]) -> Head:
    """Return a Head from plain data.

    Raises:
        ConfigError: unknown or missing options.
    """
    try:
        return Head(data["name"], data["kind"], data["size"], tuple(data.get("levels", ())))
    except (KeyError, TypeError):
        raise ConfigError(f"head: expected name, kind, size and levels, found {data}") from None
