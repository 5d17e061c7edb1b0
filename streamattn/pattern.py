"""What a query sees: patterns, their parts, and their parallel form.

A query sees its window exactly, and of older tokens what the other parts kept. A token is handed on at the step in
which it leaves the window; the first part that takes it owns it, so that nothing is counted twice. All parts of a
pattern share one softmax.

Letters: `W` window, `t` query position, `j` key position, `P` long slots, `B N Hq Hk D M` as in `kernels/reference.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamattn.errors import ConfigError
from streamattn.kernels import reference as ops
from streamattn.kernels.reference import NEVER, Partial


def _require(condition: bool, name: str, expected: str, found: object) -> None:
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, found {found!r}")


def _require_count(value: object, name: str, least: int) -> None:
    _require(isinstance(value, int) and not isinstance(value, bool) and value >= least, name, f">= {least}", value)


@dataclass(frozen=True)
class Window:
    """The `size` most recent positions, counting the query itself: visible iff `t - j < size`.

    Mistral's convention (arXiv 2310.06825); Longformer's `attention_window = 2 w` is `size = w + 1` here.
    """

    size: int

    def __post_init__(self) -> None:
        _require_count(self.size, "Window.size", 1)


@dataclass(frozen=True)
class Global:
    """Tokens that stay visible after they have left the window: the first `first`, and up to `pinned` pinned ones.

    Longformer's global tokens, causal (arXiv 2004.05150); the first ones are StreamingLLM's attention sinks
    (arXiv 2309.17453). A token is pinned at run time while it is in the window, and seen until it is unpinned.
    """

    first: int = 0
    pinned: int = 0

    def __post_init__(self) -> None:
        _require_count(self.first, "Global.first", 0)
        _require_count(self.pinned, "Global.pinned", 0)
        _require(self.first + self.pinned > 0, "Global", "first or pinned tokens", self)

    @property
    def slots(self) -> int:
        """Long slots this part occupies."""
        return self.first + self.pinned


@dataclass(frozen=True)
class Strided:
    """The last `width` of every `every` positions, for `keep` strides after they have left the window.

    Sparse Transformer's *fixed* pattern (arXiv 1904.10509, section 4.2): position j is kept iff
    `j mod every >= every - width`, and expires at `j + W + keep * every`.
    """

    every: int
    keep: int
    width: int = 1

    def __post_init__(self) -> None:
        _require_count(self.every, "Strided.every", 1)
        _require_count(self.keep, "Strided.keep", 1)
        _require_count(self.width, "Strided.width", 1)
        _require(self.width <= self.every, "Strided.width", f"<= every = {self.every}", self.width)

    @property
    def slots(self) -> int:
        """Long slots this part occupies."""
        return self.keep * self.width


@dataclass(frozen=True)
class Kernel:
    """All older tokens in a state of fixed size: Performer's positive orthogonal random features (arXiv 2009.14794).

    A key that left the window `n` steps ago counts with `decay ** n`. The features are a function of
    (seed, layer, key head), never redrawn, and taken of unrotated queries and keys: those of rotated ones estimate the
    same kernel with an error that changes with the absolute position. With `decay = 1` the state tends to the mean of
    the whole past.
    """

    features: int
    decay: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require_count(self.features, "Kernel.features", 1)
        _require_count(self.seed, "Kernel.seed", 0)
        _require(0.0 < self.decay <= 1.0, "Kernel.decay", "0 < decay <= 1", self.decay)

    def omega(self, layer: int, kv_heads: int, head_dim: int) -> Tensor:
        """Return the random projections of a layer: [Hk, M, D] float64, rows orthogonal in blocks of D."""
        heads = [_orthogonal_features(self.seed, layer, head, self.features, head_dim) for head in range(kv_heads)]
        return torch.from_numpy(np.stack(heads))


Part = Window | Global | Strided | Kernel
_KINDS: dict[str, type[Part]] = {"window": Window, "global": Global, "strided": Strided, "kernel": Kernel}


class Routes(NamedTuple):
    """Where keys go when they leave the window; all of the shape of the positions asked for."""

    slot: Tensor  # int64 long slot, or -1
    expire: Tensor  # int64: the first query position that no longer sees the key as an index key
    to_kernel: Tensor  # bool: the key goes to the Kernel part


class Pattern:
    """The immutable description of one layer's attention: parts in order of ownership.

    `Pattern(Window(64), Global(first=4))`. At most one Window (first) and one Global; at most one Kernel (last).

    Raises:
        ConfigError: parts that cannot be composed.
    """

    def __init__(self, *parts: Part) -> None:
        _require(len(parts) > 0, "Pattern", "at least one part", parts)
        for part in parts:
            _require(
                isinstance(part, Window | Global | Strided | Kernel), "Pattern", "parts of streamattn.pattern", part
            )
        for kind in (Window, Global, Kernel):
            _require(sum(isinstance(p, kind) for p in parts) <= 1, "Pattern", f"at most one {kind.__name__}", parts)
        _require(not any(isinstance(p, Window) for p in parts[1:]), "Pattern", "Window as the first part", parts)
        _require(not any(isinstance(p, Kernel) for p in parts[:-1]), "Pattern", "Kernel as the last part", parts)
        self.parts = parts
        self.window = parts[0].size if isinstance(parts[0], Window) else 0
        self.kernel = parts[-1] if isinstance(parts[-1], Kernel) else None
        self.long_slots = sum(part.slots for part in parts if isinstance(part, Global | Strided))
        self.num_pins = next((part.pinned for part in parts if isinstance(part, Global)), 0)
        self.slots = self.long_slots + self.window
        self.first_pinned_slot = self._first_pinned_slot()
        # Positions from here on are handed on to nothing, whatever happens; most decode steps need not ask `routes`.
        only_first = self.num_pins == 0 and not any(isinstance(part, Strided | Kernel) for part in parts)
        self.routed_before = max((p.first for p in parts if isinstance(p, Global)), default=0) if only_first else NEVER

    def _first_pinned_slot(self) -> int:
        base = 0
        for part in self.parts:
            if isinstance(part, Global):
                return base + part.first
            base += part.slots if isinstance(part, Strided) else 0
        return base

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def __repr__(self) -> str:
        return f"Pattern({', '.join(map(repr, self.parts))})"

    def to_config(self) -> list[dict[str, Any]]:
        """Return the parts as plain data, for checkpoints."""
        names = {kind: name for name, kind in _KINDS.items()}
        return [{"part": names[type(part)], **asdict(part)} for part in self.parts]

    @classmethod
    def from_config(cls, config: object) -> Pattern:
        """Return the pattern that `to_config` described.

        Raises:
            ConfigError: unknown parts or options.
        """
        _require(isinstance(config, list), "pattern", "a list of parts", config)
        parts: list[Part] = []
        for entry in config:  # type: ignore[union-attr]
            _require(
                isinstance(entry, dict) and entry.get("part") in _KINDS, "pattern part", f"one of {[*_KINDS]}", entry
            )
            options = {name: value for name, value in entry.items() if name != "part"}
            try:
                parts.append(_KINDS[entry["part"]](**options))
            except TypeError:
                raise ConfigError(f"pattern part {entry['part']!r}: unknown or missing option in {options}") from None
        return cls(*parts)

    def routes(self, j: Tensor, pins: Tensor | None = None) -> Routes:
        """Return what becomes of keys when they leave the window.

        Args:
            j: int64 positions; negative ones go nowhere and are never visible.
            pins: [..., num_pins] int64 pinned positions (-1: free), with the leading dimensions of `j`'s all but last.
        """
        slot = torch.full_like(j, -1)
        expire = j + self.window
        free = j >= 0
        base = 0
        for part in self.parts:
            if isinstance(part, Global):
                for wanted, target in self._global_targets(part, j, pins):
                    taken = wanted & free
                    slot = torch.where(taken, base + target, slot)
                    expire = expire.masked_fill(taken, NEVER)
                    free = free & ~taken
                base += part.slots
            elif isinstance(part, Strided):
                phase = torch.remainder(j, part.every) - (part.every - part.width)
                taken = free & (phase >= 0)
                ring = torch.remainder(torch.div(j, part.every, rounding_mode="floor"), part.keep) * part.width + phase
                slot = torch.where(taken, base + ring, slot)
                expire = torch.where(taken, j + self.window + part.keep * part.every, expire)
                free = free & ~taken
                base += part.slots
        to_kernel = free if self.kernel is not None else torch.zeros_like(free)
        return Routes(slot, torch.where(j >= 0, expire, -1), to_kernel)

    @staticmethod
    def _global_targets(part: Global, j: Tensor, pins: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        yield j < part.first, j
        if part.pinned and pins is not None:
            matches = j.unsqueeze(-1) == pins.unsqueeze(-2)  # [..., N, num_pins]
            yield matches.any(-1), part.first + matches.to(torch.int8).argmax(-1)

    def memory_bytes(self, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Return the bytes of one lane's state in one layer: slabs, expiries and kernel state."""
        slabs = 2 * kv_heads * self.slots * head_dim * dtype.itemsize
        expiries = kv_heads * self.long_slots * torch.int64.itemsize
        state = 0
        if self.kernel is not None:
            sums = kv_heads * self.kernel.features * (head_dim + 2)
            state = sums * ops.accumulator_dtype(dtype).itemsize
        return slabs + expiries + state


# --- presets ---------------------------------------------------------------------------------------------------------


def sliding_window(size: int) -> Pattern:
    """Return a plain sliding window of `size` positions, the query included."""
    return Pattern(Window(size))


def streaming_llm(window: int, first: int = 4) -> Pattern:
    """Return a window and the first tokens (StreamingLLM, arXiv 2309.17453), at absolute positions."""
    return Pattern(Window(window), Global(first=first))


# --- the parallel form -----------------------------------------------------------------------------------------------


def parallel_attention(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    unrotated: tuple[Tensor, Tensor] | None = None,
    omega: Tensor | None = None,
    block: int = 128,
) -> Tensor:
    """Return attention of whole sequences from position 0, without a cache: [B, N, Hq, D].

    Queries go in blocks over the keys that any of them sees, so the cost is linear in N for every bounded pattern.

    Args:
        q: [B, N, Hq, D], rotated.
        k, v: [B, N, Hk, D], rotated.
        scale: factor of the logits.
        unrotated: q and k before rotation, and
        omega: [Hk, M, D], if the pattern has a Kernel part.
        block: queries in a block.
    """
    N = q.shape[1]
    positions = torch.arange(N, device=q.device)
    routes = pattern.routes(positions)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)  # [B, Hk, N, D]
    kernel = None
    if pattern.kernel is not None:
        assert unrotated is not None, "a Kernel part needs the unrotated queries and keys"
        kernel = _ParallelKernel(pattern, *unrotated, v, routes.to_kernel, scale, omega)
    alive = positions[:0]
    outputs: list[Tensor] = []
    for start in range(0, N, block):
        t = positions[start : start + block]
        alive = torch.cat((alive[routes.expire[alive] > start], t[routes.expire[t] > t]))
        visible = (alive <= t[:, None]) & (t[:, None] < routes.expire[alive])
        partials = [ops.attend(q[:, t], keys[:, :, alive], values[:, :, alive], visible[None, None], scale)]
        if kernel is not None:
            partials.append(kernel.block(start, len(t)))
        outputs.append(ops.finish(ops.merge(partials)).to(q.dtype))
    return torch.cat(outputs, dim=1)


class _ParallelKernel:
    """The Kernel part over blocks of queries: keys handed on in earlier blocks as sums, in this block pairwise."""

    def __init__(
        self, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, taken: Tensor, scale: float, omega: Tensor | None
    ) -> None:
        assert pattern.kernel is not None
        assert omega is not None
        self.window = pattern.window
        self.log_decay = math.log(pattern.kernel.decay)
        group = q.shape[2] // k.shape[2]
        self.log_query = ops.log_features(q, omega.repeat_interleave(group, 0), scale)  # [B, N, Hq, M]
        self.taken = taken  # [N]
        self.log_key = ops.log_features(k, omega, scale).repeat_interleave(group, 2)
        self.value = v.repeat_interleave(group, 2).to(self.log_key.dtype)
        B, _, Hq, M = self.log_query.shape
        self.log_max = self.log_query.new_full((B, Hq, M), -math.inf)
        self.values = self.log_query.new_zeros((B, Hq, M, v.shape[-1]))
        self.weights = self.log_query.new_zeros((B, Hq, M))

    def block(self, start: int, size: int) -> Partial:
        t = torch.arange(start, start + size, device=self.value.device)
        handed = t - self.window  # the key that joins at each of these steps
        handed = handed[handed >= 0]
        handed = handed[self.taken[handed]]
        joined = handed + self.window
        age = (t[:, None] - joined).to(self.log_query.dtype)
        query = self.log_query[:, t]  # [B, T, Hq, M]
        key, value = self.log_key[:, handed], self.value[:, handed]
        steps = (t - start + 1).to(query.dtype)[:, None, None]
        decayed = steps * self.log_decay + self.log_max.unsqueeze(1)
        partials = [self._read(query + decayed)]
        if len(handed):
            pairs = torch.logsumexp(query.unsqueeze(2) + key.unsqueeze(1), -1)  # [B, T, J, Hq]
            pairs = pairs + age[None, :, :, None] * self.log_decay
            partials.append(self._softmax(pairs.masked_fill((age < 0)[None, :, :, None], -math.inf), value))
        self._absorb(key, value, (start + size - 1) - joined, size)
        return ops.merge(partials)

    def _read(self, logits: Tensor) -> Partial:
        maximum = logits.detach().amax(-1, keepdim=True)
        weights = torch.exp(logits - torch.where(maximum.isinf(), 0.0, maximum))
        numerator = torch.einsum("bthm,bhmd->bthd", weights, self.values)
        return Partial(maximum, numerator, torch.einsum("bthm,bhm->bth", weights, self.weights).unsqueeze(-1))

    @staticmethod
    def _softmax(pairs: Tensor, value: Tensor) -> Partial:
        maximum = pairs.detach().amax(2)  # [B, T, Hq]
        weights = torch.exp(pairs - torch.where(maximum.isinf(), 0.0, maximum).unsqueeze(2))
        numerator = torch.einsum("btjh,bjhd->bthd", weights, value)
        return Partial(maximum.unsqueeze(-1), numerator, weights.sum(2).unsqueeze(-1))

    def _absorb(self, key: Tensor, value: Tensor, age: Tensor, size: int) -> None:
        log_key = key + age.to(key.dtype)[:, None, None] * self.log_decay  # [B, J, Hq, M]
        decayed = self.log_max + size * self.log_decay
        log_max = torch.cat((decayed.unsqueeze(1), log_key.detach()), dim=1).amax(1)
        safe = torch.where(log_max.isinf(), 0.0, log_max)
        keep, gain = torch.exp(decayed - safe), torch.exp(log_key - safe.unsqueeze(1))
        self.values = self.values * keep.unsqueeze(-1) + torch.einsum("bjhm,bjhd->bhmd", gain, value)
        self.weights = self.weights * keep + gain.sum(1)
        self.log_max = log_max


# --- random features -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _orthogonal_features(seed: int, layer: int, head: int, features: int, head_dim: int) -> np.ndarray:
    """Return [M, D] float64: Haar-orthogonal rows in blocks of D, with the norms of Gaussian vectors."""
    blocks = -(-features // head_dim)
    gaussian = _gaussians((seed, layer, head, 0), blocks * head_dim * head_dim).reshape(blocks, head_dim, head_dim)
    rows = []
    for block in gaussian:
        basis, upper = np.linalg.qr(block)
        rows.append((basis * np.sign(np.diag(upper))).T)  # without the signs the basis is not Haar-distributed
    norms = np.linalg.norm(_gaussians((seed, layer, head, 1), features * head_dim).reshape(features, head_dim), axis=1)
    return np.concatenate(rows)[:features] * norms[:, None]


def _gaussians(key: Sequence[int], count: int) -> np.ndarray:
    """Return standard normals that depend on `key` alone: a counter-based generator keyed by its hash, Box-Muller."""
    digest = hashlib.blake2b(repr(tuple(key)).encode(), digest_size=16).digest()
    generator = np.random.Philox(key=np.frombuffer(digest, "<u8"))
    uniform = (generator.random_raw(2 * count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log1p(-uniform[:count]))
    return radius * np.cos(2.0 * np.pi * uniform[count:])
