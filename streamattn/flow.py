"""Monte-Carlo order flow: many sampled continuations of a live stream in one batch, summarised as a fan.

The continuations are branches: rows of a cache of their own, into which the live lane is copied. The live stream is
only read. Each event of a branch is drawn from the odds that the model's head `next` gave to it, fed back, and so on.

A fan says what the model holds possible, not what will happen: it is as good as the model's odds several steps ahead,
which no score of next events measures, and as good as the features that a `FeatureModel` makes up.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from streamattn.context import Rows, StreamContext
from streamattn.engine import Engine
from streamattn.errors import ConfigError, EngineError, StreamError
from streamattn.frame import Result
from streamattn.model import Head, Inputs

HEAD = "next"


class FeatureModel(Protocol):
    """Makes up the features of sampled events. A draw must change nothing that a later one depends on."""

    def draw(self, ids: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Return finite features [n, d] float32 of one sampled event in each of n branches.

        Args:
            ids: [n] int64, the sampled symbols.
            uniforms: [n] float64 in [0, 1); all chance of branch i comes from `uniforms[i]`.
        """
        ...


class RecentFeatures:
    """The default `FeatureModel`, a bootstrap: the features of a random recent event of the same symbol.

    It keeps the last `size` real events of each symbol of one stream; `observe` is called with what is pushed, not
    while a fan is drawn.

    What it ignores: everything but the symbol. Features of successive sampled events are independent of each other and
    of the branch so far, so pauses do not cluster, prices and counts that accumulate (a drift, a standing time, the
    state of a book) do not add up along a branch, and nothing happens that has not just happened. The further a branch
    goes, the less its inputs are like real ones. A symbol never observed borrows from a random one of all kept events;
    `borrowed` counts that.

    Args:
        symbols: number of ids.
        features: floats an event.
        size: events kept of each symbol.
    """

    def __init__(self, symbols: int, features: int, size: int = 256) -> None:
        if min(symbols, features, size) < 1:
            raise ConfigError(f"RecentFeatures: expected sizes >= 1, found {symbols}, {features} and {size}")
        self.borrowed = 0
        self._kept = np.zeros((symbols, size, features), np.float32)
        self._seen = np.zeros(symbols, np.int64)  # events of each symbol so far; number i lies in slot i mod size

    def observe(self, ids: object, features: object) -> None:
        """Keep real events: ids [n] and features [n, d], or one event as a scalar and [d].

        Raises:
            ConfigError: other shapes, or an id out of range.
        """
        columns, rows = np.atleast_1d(np.asarray(ids)), np.atleast_2d(np.asarray(features, np.float32))
        symbols, size, width = self._kept.shape
        if columns.ndim != 1 or rows.shape != (len(columns), width):
            raise ConfigError(f"observe: expected features [{len(columns)}, {width}], found {list(rows.shape)}")
        if len(columns) and not 0 <= columns.min() <= columns.max() < symbols:
            raise ConfigError(f"observe: expected ids 0 to {symbols - 1}, found {columns.min()} to {columns.max()}")
        for symbol, row in zip(columns.tolist(), rows, strict=True):
            self._kept[symbol, self._seen[symbol] % size] = row
            self._seen[symbol] += 1

    def draw(self, ids: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Return the features of a random kept event for each id: [n, d] float32.

        Raises:
            ConfigError: nothing has been observed yet.
        """
        held = np.minimum(self._seen, self._kept.shape[1])
        if not held.any():
            raise ConfigError("RecentFeatures: expected some observed events, found none; call observe first")
        unseen = held[ids] == 0
        self.borrowed += int(unseen.sum())
        slot = (uniforms * held[ids]).astype(np.int64)
        if not unseen.any():
            return self._kept[ids, slot]
        starts = np.concatenate(([0], held.cumsum()))
        pick = (uniforms * starts[-1]).astype(np.int64)
        lender = np.searchsorted(starts, pick, side="right") - 1
        symbol = np.where(unseen, lender, ids)
        return self._kept[symbol, np.where(unseen, pick - starts[lender], slot)]


@dataclass(frozen=True, eq=False)
class Fan:
    """n sampled continuations of k events. L quantile levels, V symbols; quantiles are over the branches.

    Attributes:
        stream: its name. position: of the first sampled event.
        levels: [L], rising.
        ids: [k, n] int32, the sampled events.
        counts: [k, V, L] float64, how often each symbol has occurred up to and including each step.
        walks: name -> [k, L] float64, the running sum of the symbols' weights.
        medians: name of a quantile head -> [k, L] float64, its median after each sampled event, in the head's units.
        features, heads: inputs [k, n, d] and answers [k, n, size] of every branch, if they were asked for.
    """

    stream: str
    position: int
    levels: tuple[float, ...]
    ids: np.ndarray
    counts: np.ndarray
    walks: dict[str, np.ndarray]
    medians: dict[str, np.ndarray]
    features: np.ndarray | None = None
    heads: dict[str, np.ndarray] = field(default_factory=dict)

    def frequencies(self) -> np.ndarray:
        """Return the share of branches that have each symbol at each step: [k, V] float64."""
        return np.stack([(self.ids == symbol).mean(axis=1) for symbol in range(self.counts.shape[1])], axis=1)


class _Fork(NamedTuple):
    stream: str
    position: int
    logits: Tensor  # [1, V], of the next event


class FlowSampler:
    """Continues live streams of an Engine by chance, n branches at once.

    Its cache of n lanes is allocated here, once. `sample` runs on the engine's thread and keeps it busy for as long as
    it takes; with AsyncEngine, `await running.call(lambda: sampler.sample(result, 50, recent))`. To keep live streams
    waiting only for the copy, call `fork` there and `draw` on another thread.

    Each draw depends on (seed, stream's name, position, branch) alone: Philox, keyed by a hash of the first three, of
    which branch i takes the i-th number. So a fan is reproducible, whatever else the engine serves, and its first
    branches are those of a smaller sampler; only where a draw falls on the last bit of an odd may another batch size,
    which rounds differently, decide otherwise. Two fans of one stream share the draws of the positions they share.

    Args:
        engine: its model has ids and a head `next` of logits over them.
        branches: n.
        seed: of all draws.
        temperature: the logits are divided by it.
        levels: quantiles of the fan, rising, in (0, 1).
        walks: name -> weight of each symbol, [V]: what to sum up along a branch, e.g. {"move": (-1, 0, 1)}.

    Raises:
        ConfigError: impossible arguments, or a model without ids or without the head.
    """

    def __init__(
        self,
        engine: Engine,
        branches: int,
        *,
        seed: int = 0,
        temperature: float = 1.0,
        levels: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95),
        walks: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        config = engine.model.config
        if not any(head.name == HEAD and head.kind == "logits" and head.size == config.vocab for head in config.heads):
            raise ConfigError(f"FlowSampler: expected a model of ids with logits {HEAD!r} over them, found none")
        if branches < 1:
            raise ConfigError(f"branches: expected >= 1, found {branches}")
        if not 0 < temperature < math.inf:
            raise ConfigError(f"temperature: expected > 0, found {temperature}")
        if not levels or not all(low < high for low, high in pairwise((0.0, *levels, 1.0))):
            raise ConfigError(f"levels: expected rising ones in (0, 1), found {tuple(levels)}")
        self.engine, self.branches, self.seed, self.temperature = engine, branches, seed, temperature
        self.levels = tuple(levels)
        self.walks = {name: _weights(name, values, config.vocab) for name, values in (walks or {}).items()}
        self.cache = engine.model.new_cache(branches)
        self._fork: _Fork | None = None

    @property
    def cache_bytes(self) -> int:
        """Bytes allocated for the branches; constant for the sampler's life."""
        return self.cache.allocated_bytes()

    def sample(self, result: Result, steps: int, features: FeatureModel | None = None, *, keep: bool = False) -> Fan:
        """Return a fan of `steps` events from the stream that gave `result`: `fork`, then `draw`."""
        _check_steps(steps)
        self.fork(result)
        return self.draw(steps, features, keep=keep)

    def fork(self, result: Result) -> None:
        """Copy the stream's lane into all branches. Runs on the engine's thread.

        Args:
            result: the stream's newest answer; nothing may have been computed on the stream since. A cache does not
                hold answers, so for streams fed by frames this is the caller's promise; a `Stream` knows better.

        Raises:
            StreamError: the stream is not open, or has taken events since.
            ConfigError: the result holds no answer of the head.
        """
        handle = self.engine.streams.get(result.stream)
        if handle is None:
            raise StreamError(result.stream, "is not open")
        after = result.sequence + result.num_events
        if handle.sequence and handle.sequence != after:  # a stream fed by frames does not count here
            raise StreamError(result.stream, f"expected its newest answer, before {handle.sequence}, found {after}")
        logits = result.heads.get(HEAD)
        vocab = self.engine.model.config.vocab
        if logits is None or logits.ndim != 2 or not len(logits) or logits.shape[1] != vocab:
            raise ConfigError(f"result: expected an answer of the head {HEAD!r} with {vocab} logits, found none")
        if not np.isfinite(logits[-1]).all():
            raise ConfigError("result: expected finite logits, found NaN or infinity")
        self.cache.copy_lane_from(self.engine.cache, handle.lane, slice(None))
        self._fork = _Fork(result.stream, handle.position, torch.tensor(logits[-1:]))

    @torch.inference_mode()
    def draw(self, steps: int, features: FeatureModel | None = None, *, keep: bool = False) -> Fan:
        """Return a fan of `steps` events, and use up the last `fork`. Any one thread; live lanes are not touched.

        Args:
            steps: k >= 1.
            features: required if, and only if, the model takes features.
            keep: whether the fan holds every branch's features and answers, too.

        Raises:
            ConfigError: impossible arguments, or features that do not fit the model.
            EngineError: no fork, or the model's answer is NaN or infinite.
        """
        config = self.engine.model.config
        _check_steps(steps)
        if (features is None) == bool(config.features):
            wanted = "a FeatureModel" if config.features else "none"
            raise ConfigError(f"features: expected {wanted} for this model, found otherwise")
        fork, self._fork = self._fork, None
        if fork is None:
            raise EngineError("draw: expected a fork that has not been used, found none; call fork first")
        quantiles = [head for head in config.heads if _median_inside(head)]
        summary = _Summary(self, steps, quantiles, keep)
        logits, n = fork.logits, self.branches
        for step in range(steps):
            position = fork.position + step
            ids = _pick(logits, self.temperature, self._uniforms(fork.stream, position, HEAD))
            columns = None
            if features is not None:
                chance = self._uniforms(fork.stream, position, "features")
                columns = _checked(features.draw(ids, chance), (n, config.features))
            summary.add_events(step, ids, columns)
            if step + 1 < steps or quantiles or keep:  # or nobody asks for the last answer
                heads = self._step(ids, columns)
                summary.add_heads(step, heads)
                logits = heads[HEAD]
        return summary.fan(fork)

    def _uniforms(self, stream: str, position: int, purpose: str) -> np.ndarray:
        """Return one number in [0, 1) for each branch: [n] float64."""
        key = repr((self.seed, stream, position, purpose)).encode()
        words = np.frombuffer(hashlib.blake2b(key, digest_size=16).digest(), "<u8")
        raw = np.random.Philox(key=words).random_raw(self.branches)
        return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _step(self, ids: np.ndarray, features: np.ndarray | None) -> dict[str, Tensor]:
        model, device = self.engine.model, self.cache.device
        columns = None if features is None else torch.from_numpy(features).to(device)
        context = StreamContext(self.cache, Rows(list(range(self.branches)), [1] * self.branches), model.config.scale)
        heads = model(Inputs(torch.from_numpy(ids).to(device), columns), context)
        context.commit()
        heads = {name: value.to(torch.float32).cpu() for name, value in heads.items()}
        if not all(bool(value.isfinite().all()) for value in heads.values()):
            raise EngineError("draw: the model's answer is NaN or infinite")
        return heads


class _Summary:
    """Running statistics of all branches, and their quantiles so far."""

    def __init__(self, sampler: FlowSampler, steps: int, quantiles: Sequence[Head], keep: bool) -> None:
        n, vocab = sampler.branches, sampler.engine.model.config.vocab
        self.levels, self.weights, self.quantile_heads, self.keep = sampler.levels, sampler.walks, quantiles, keep
        self.ids = np.empty((steps, n), np.int32)
        self.count, self.sum = np.zeros((n, vocab)), {name: np.zeros(n) for name in self.weights}
        self.counts = np.empty((steps, vocab, len(self.levels)))
        self.walks = {name: np.empty((steps, len(self.levels))) for name in self.weights}
        self.medians = {head.name: np.empty((steps, len(self.levels))) for head in quantiles}
        self.features: list[np.ndarray] = []
        self.heads: dict[str, list[np.ndarray]] = {}

    def add_events(self, step: int, ids: np.ndarray, features: np.ndarray | None) -> None:
        self.ids[step] = ids
        self.count[np.arange(len(ids)), ids] += 1
        self.counts[step] = self._over_branches(self.count).T
        for name, weights in self.weights.items():
            self.sum[name] += weights[ids]
            self.walks[name][step] = self._over_branches(self.sum[name])
        if self.keep and features is not None:
            self.features.append(features)

    def add_heads(self, step: int, heads: dict[str, Tensor]) -> None:
        for head in self.quantile_heads:
            self.medians[head.name][step] = self._over_branches(_median(heads[head.name].numpy(), head.levels))
        if self.keep:
            for name, value in heads.items():
                self.heads.setdefault(name, []).append(value.numpy())

    def _over_branches(self, values: np.ndarray) -> np.ndarray:
        # A value that some branch has: half a price move would be none.
        return np.quantile(values, self.levels, axis=0, method="inverted_cdf")

    def fan(self, fork: _Fork) -> Fan:
        features = np.stack(self.features) if self.features else None
        heads = {name: np.stack(values) for name, values in self.heads.items()}
        own = self.levels, self.ids, self.counts, self.walks, self.medians
        return Fan(fork.stream, fork.position, *own, features, heads)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ConfigError(f"steps: expected >= 1, found {steps}")


def _weights(name: str, values: Sequence[float], vocab: int) -> np.ndarray:
    weights = np.asarray(values, np.float64)
    if weights.shape != (vocab,) or not np.isfinite(weights).all():
        raise ConfigError(f"walks[{name!r}]: expected a finite weight for each of {vocab} symbols, found {values!r}")
    return weights


def _pick(logits: Tensor, temperature: float, uniforms: np.ndarray) -> np.ndarray:
    """Return symbols [n] int64 by inversion, from logits [n, V] or, for all branches alike, [1, V]."""
    edges = (logits.double() / temperature).softmax(-1).cumsum(-1).numpy()
    return (uniforms[:, None] >= edges[:, :-1] / edges[:, -1:]).sum(axis=1)


def _checked(features: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    found = np.ascontiguousarray(features, np.float32)
    if found.shape != shape or not np.isfinite(found).all():
        raise ConfigError(f"FeatureModel.draw: expected finite floats {list(shape)}, found {list(found.shape)}")
    return found


def _median_inside(head: Head) -> bool:
    return head.kind == "quantiles" and head.levels[0] <= 0.5 <= head.levels[-1]


def _median(values: np.ndarray, levels: tuple[float, ...]) -> np.ndarray:
    """Return the median [n] between the two levels around it; crossed quantiles [n, size] are put in order first."""
    ordered = np.sort(values.astype(np.float64), axis=1)
    after = int(np.searchsorted(levels, 0.5))
    if levels[after] == 0.5:
        return ordered[:, after]
    share = (0.5 - levels[after - 1]) / (levels[after] - levels[after - 1])
    return ordered[:, after - 1] + share * (ordered[:, after] - ordered[:, after - 1])
