"""Fit a small StreamTransformer to recorded tapes.

Training cuts each tape into segments, each its own stream, and walks them side by side, chunk by chunk, with the cache
carried on, so the model meets full rings, wrap-around and hand-off exactly as a stream does; gradients stay within a
chunk. No segment goes from one tape to another (a tape and its mirror image count as one); one that comes to the end of
its tape before the others goes on at its beginning, as a new stream. Everything random comes from one seed.

One model may have several heads (see `streamattn.scores`); their losses are summed, the further ones at a quarter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from streamattn.cache import StreamCache
from streamattn.checkpoint import Checkpoint
from streamattn.context import Rows, StreamContext
from streamattn.errors import ConfigError
from streamattn.evaluate import Progress, Score, evaluate, parallel_bits, streaming_bits, tape_inputs
from streamattn.model import Head, Inputs, ModelConfig, StreamTransformer
from streamattn.pattern import Global, Pattern, Window
from streamattn.scores import GAP, GAP_LEVELS, MOVE, MOVES, NEXT, UNKNOWN, gap_targets, move_targets
from streamattn.tape import FeatureSchema, Tape, fingerprint, mirrored

__all__ = [
    "Progress", "Score", "TrainOptions", "evaluate", "fingerprint", "parallel_bits", "streaming_bits", "train",
]  # fmt: skip

_STANDING = 1.0  # of the channel that stands still
_EXTRA_WEIGHT = 0.25  # of the losses of heads other than `next`
_ADDED = ("heads", "horizon", "jitter")  # options younger than the first checkpoints: written down where they are used


@dataclass(frozen=True)
class TrainOptions:
    """How `train` fits a model.

    Attributes:
        fraction: of each tape that is trained on, from its start.
        validation: of that part, at its end, that is held out for early stopping.
        layers, width, q_heads, kv_heads, head_dim, ffn, window, first: the model's shape; `first` global tokens.
        segments: pieces of the tapes that are walked side by side. chunk: events of each in one step.
        epochs: at most. patience: epochs without a better validation score before it stops.
        learning_rate, weight_decay, warmup_steps, clip: of AdamW with a cosine schedule.
        mirror: whether to train on every tape with up and down exchanged, too.
        seed: of weights and segment offsets.
        heads: what to foretell: `next`, and of `gap` and `move` those that the tapes can supply.
        horizon: events over which `move` looks ahead.
        jitter: how much the features of a segment are moved and stretched at random, alike at all its events: on
            average this many standard deviations, drawn for each segment from 0 to twice that; and a fifth of that
            share of them is silenced. It keeps a model that is to serve another instrument from trusting this one's
            levels. Columns named `odds_…` are spared: they tell a stream's own habits.
    """

    fraction: float = 0.8
    validation: float = 0.1
    layers: int = 2
    width: int = 48
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 128
    window: int = 64
    first: int = 4
    segments: int = 16
    chunk: int = 128
    epochs: int = 8
    patience: int = 3
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 50
    clip: float = 1.0
    mirror: bool = False
    seed: int = 0
    heads: tuple[str, ...] = (NEXT,)
    horizon: int = 20
    jitter: float = 0.0

    def __post_init__(self) -> None:
        for name in ("fraction", "validation"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ConfigError(f"{name}: expected between 0 and 1, found {getattr(self, name)}")
        for name in ("segments", "chunk", "epochs", "patience", "horizon"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected >= 1, found {getattr(self, name)}")
        if NEXT not in self.heads or len(set(self.heads)) < len(self.heads) or set(self.heads) - {NEXT, GAP, MOVE}:
            raise ConfigError(f"heads: expected {NEXT}, and {GAP} or {MOVE} once each, found {', '.join(self.heads)}")

    def pattern(self) -> Pattern:
        """Return the pattern of every layer."""
        return Pattern(Window(self.window), *([Global(first=self.first)] if self.first else []))


def train(tapes: dict[str, Tape], options: TrainOptions, progress: Progress | None = None) -> Checkpoint:
    """Return a model fitted to the first part of every tape.

    Args:
        tapes: spec -> tape; all of one schema.
        options: shape and recipe.
        progress: called after every step.

    Raises:
        ConfigError: no tapes, different schemas, or a tape too short for the segments.
    """
    if not tapes:
        raise ConfigError("tapes: expected at least one, found none")
    schema = next(iter(tapes.values())).schema
    for tape in tapes.values():
        schema.check_same(tape.schema)
    used = {spec: tape.slice(0, int(len(tape) * options.fraction)) for spec, tape in tapes.items()}
    fitted = [tape.slice(0, int(len(tape) * (1 - options.validation))) for tape in used.values()]
    held_out = [tape.slice(int(len(tape) * (1 - options.validation)), len(tape)) for tape in used.values()]
    images = [mirrored(tape) for tape in fitted] if options.mirror else []
    torch.manual_seed(options.seed)
    names = [name for name in options.heads if name != MOVE or all("mid" in t.targets for t in tapes.values())]
    model = _new_model([*fitted, *images], names, options)
    pieces = list(zip(fitted, images, strict=True)) if images else [(tape,) for tape in fitted]
    fit = _Fit(model, pieces, held_out, options, progress)
    fit.run()
    heads = {GAP: {"unit": "log1p(ns)"}, MOVE: {"events": options.horizon, "classes": list(MOVES)}}
    return Checkpoint(
        model.eval(),
        schema,
        {
            "tapes": [
                {"spec": spec, "fingerprint": fingerprint(tapes[spec]), "start": 0, "stop": len(tape)}
                for spec, tape in used.items()
            ],
            "options": _written(options),
            **({"heads": {name: heads[name] for name in names if name in heads}} if len(names) > 1 else {}),
            "validation_bits": round(fit.best_bits, 5),
            "epochs": fit.epochs_run,
        },
    )


def _written(options: TrainOptions) -> dict[str, Any]:
    fields = TrainOptions.__dataclass_fields__
    values = {name: getattr(options, name) for name in fields}
    return {name: v for name, v in values.items() if name not in _ADDED or v != fields[name].default}


def _adaptive(schema: FeatureSchema) -> np.ndarray:
    """Return which features tell a stream's own habits, log odds counted on it: [d] bool."""
    return np.array([name.startswith("odds_") for name in schema.features], bool)


def _head(name: str, schema: FeatureSchema) -> Head:
    if name == GAP:
        return Head(GAP, "quantiles", len(GAP_LEVELS), GAP_LEVELS)
    return Head(MOVE, "classes", len(MOVES)) if name == MOVE else Head(NEXT, "logits", len(schema.symbols))


def _new_model(tapes: Sequence[Tape], names: Sequence[str], options: TrainOptions) -> StreamTransformer:
    schema = tapes[0].schema
    features = np.concatenate([tape.features for tape in tapes]).astype(np.float64)
    mean, std = features.mean(0), features.std(0)
    # What is rare here may be common elsewhere: its odds, of natural size already, must not be blown up.
    std = np.where(_adaptive(schema), np.maximum(std, 1.0), std)
    config = ModelConfig(
        patterns=(options.pattern(),) * options.layers,
        width=options.width,
        q_heads=options.q_heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        ffn=options.ffn,
        heads=tuple(_head(name, schema) for name in names),
        vocab=len(schema.symbols),
        features=len(schema.features),
    )
    model = StreamTransformer(config, _tensor(mean), _tensor(np.where(std > 0, std, 1.0)))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, 0.0, 0.02)
        if name.endswith(("output.weight", "down.weight")):  # the residual stream keeps its size with depth
            nn.init.normal_(parameter, 0.0, 0.02 / math.sqrt(2 * options.layers))
    if GAP in model.heads:
        _start_gap(model, tapes)
    return model


@torch.no_grad()
def _start_gap(model: StreamTransformer, tapes: Sequence[Tape]) -> None:
    """Let the head `gap` begin at the quantiles of all gaps: heads have no bias, so one channel is made to stand still.

    From a start at 0, some 14 units away, it would spend most of a short training on getting there.
    """
    gaps = np.concatenate([gap_targets(tape.event_ns) for tape in tapes])
    level = _tensor(np.nanquantile(gaps, GAP_LEVELS))
    model.embedding.weight[:, 0] = _STANDING
    model.get_parameter(f"heads.{GAP}.weight")[:, 0] = level / math.sqrt(model.config.width)
    for block in model.blocks:
        block.get_parameter("output.weight")[0] = 0
        block.get_parameter("down.weight")[0] = 0
    if model.config.features:
        model.feature_input.weight[0] = 0


def _tensor(values: np.ndarray) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


class _Fit:
    """One training run.

    Args:
        model: fitted in place.
        pieces: tapes, each perhaps with its mirror image, that segments are cut from; none goes from one to another.
        held_out: for early stopping.
        options, progress: as for `train`.
    """

    def __init__(
        self,
        model: StreamTransformer,
        pieces: Sequence[tuple[Tape, ...]],
        held_out: Sequence[Tape],
        options: TrainOptions,
        progress: Progress | None,
    ) -> None:
        self.model, self.options, self.progress = model, options, progress
        self.held_out = held_out
        parts = [tape for piece in pieces for tape in piece]
        self.tape = _join(parts)
        self.targets = _targets(self.tape, parts, model, options)
        self.random = np.random.default_rng(options.seed)
        sizes = [sum(map(len, piece)) for piece in pieces]
        self.length = sum(sizes) // options.segments  # events of one segment
        self.steps_per_epoch = (self.length - 1) // options.chunk
        shortest = min(*sizes, *map(len, held_out))
        if self.steps_per_epoch < 1 or shortest < 2 * options.chunk or len(pieces) > options.segments:
            raise ConfigError(
                f"tape: expected at least {2 * options.segments * options.chunk} events to train on, found "
                f"{sum(sizes)} in {len(sizes)} tapes, {shortest} in the shortest part; use fewer segments or "
                f"shorter chunks, but a segment a tape"
            )
        self.begin, self.end, self.first = _segments(sizes, options.segments)
        self.total = options.epochs * self.steps_per_epoch
        decayed = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim != 2]
        groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98))
        self.best_bits, self.best_state, self.epochs_run = math.inf, model.state_dict(), 0
        self.done = 0

    def run(self) -> None:
        waited = 0
        for _ in range(self.options.epochs):
            loss = self._epoch()
            bits = self._validate()
            self.epochs_run += 1
            if bits < self.best_bits:
                self.best_bits, waited = bits, 0
                self.best_state = {name: value.clone() for name, value in self.model.state_dict().items()}
            else:
                waited += 1
            self._report(f"training {loss:.4f}, validation {bits:.4f}, best {self.best_bits:.4f} bits")
            if waited >= self.options.patience:
                break
        self.model.load_state_dict(self.best_state)

    def _epoch(self) -> float:
        """Walk all segments once, from freshly drawn starts; return the mean training bits."""
        options = self.options
        cache = self.model.new_cache(options.segments)
        rows = Rows(list(range(options.segments)), [options.chunk] * options.segments)
        cursor = self._starts()
        disturb = self._disturbance()
        losses = []
        self.model.train()
        for step in range(self.steps_per_epoch):
            self._wrap(cursor, cache)
            at = cursor[:, None] + np.arange(options.chunk)
            loss, bits = self._loss(at.ravel(), cache, rows, disturb)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
            for group in self.optimiser.param_groups:
                group["lr"] = options.learning_rate * self._schedule()
            self.optimiser.step()
            losses.append(bits)
            cursor += options.chunk
            self.done += 1
            if self.progress is not None and step % 10 == 0:
                self._report(f"training {np.mean(losses[-50:]):.4f} bits")
        return float(np.mean(losses))

    def _starts(self) -> np.ndarray:
        """Return where each segment begins: spread evenly, shifted by a random amount each epoch."""
        used = self.steps_per_epoch * self.options.chunk + 1
        shift = self.random.integers(0, max(self.length - used, 0) + 1)
        return np.minimum(self.first + shift, np.maximum(self.end - used, self.begin))

    def _wrap(self, cursor: np.ndarray, cache: StreamCache) -> None:
        """Send segments that have no chunk left back to the beginning of their tape, as new streams."""
        for lane in np.flatnonzero(cursor + self.options.chunk + 1 > self.end):
            cursor[lane] = self.begin[lane]
            cache.reset(int(lane))

    def _disturbance(self) -> tuple[Tensor, Tensor] | None:
        """Return what the features of each segment are multiplied by and moved by: [segments, 1, d] each."""
        if not self.options.jitter:
            return None
        spared = _adaptive(self.tape.schema)
        shape = self.options.segments, 1, len(spared)
        # Some segments are left nearly as they are, some are hardly to be known again.
        jitter = 2 * self.options.jitter * self.random.random((self.options.segments, 1, 1))
        scale = np.exp(0.5 * jitter * self.random.standard_normal(shape))
        scale *= self.random.random(shape) >= jitter / 5
        shift = jitter * self.random.standard_normal(shape)
        factor = _tensor(np.where(spared, 1.0, scale))
        offset = _tensor(np.where(spared, 0.0, shift))
        mean, std = self.model.mean, self.model.std
        return factor, mean * (1 - factor) + offset * std

    def _loss(
        self, at: np.ndarray, cache: StreamCache, rows: Rows, disturb: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, float]:
        """Return the loss of a step, and its bits per event of the head `next`."""
        context = StreamContext(cache, rows, self.model.config.scale)
        inputs = tape_inputs(self.tape, at)
        if disturb is not None and inputs.features is not None:
            factor, offset = disturb
            features = inputs.features.unflatten(0, (self.options.segments, -1)) * factor + offset
            inputs = Inputs(inputs.ids, features.flatten(0, 1))
        outputs = self.model(inputs, context)
        context.commit()
        targets = {name: values[torch.from_numpy(at)] for name, values in self.targets.items()}
        loss = nn.functional.cross_entropy(outputs[NEXT], targets[NEXT])
        bits = float(loss.detach()) / math.log(2)
        for name in sorted(targets.keys() - {NEXT}):
            loss = loss + _EXTRA_WEIGHT * _extra_loss(name, outputs[name], targets[name])
        return loss, bits

    def _schedule(self) -> float:
        if self.done < self.options.warmup_steps:
            return (self.done + 1) / self.options.warmup_steps
        progress = (self.done - self.options.warmup_steps) / max(self.total - self.options.warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))) * 0.98 + 0.02

    def _validate(self) -> float:
        bits = np.concatenate([parallel_bits(self.model.eval(), tape) for tape in self.held_out])
        return float(bits.mean())

    def _report(self, text: str) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total, text)


def _join(tapes: Sequence[Tape]) -> Tape:
    """Return tapes one behind the other; targets that some lack are left out."""
    if len(tapes) == 1:
        return tapes[0]
    names = set.intersection(*(set(tape.targets) for tape in tapes))
    return Tape(
        "+".join(tape.name for tape in tapes),
        tapes[0].schema,
        np.concatenate([tape.event_ns for tape in tapes]),
        np.concatenate([tape.ids for tape in tapes]),
        np.concatenate([tape.features for tape in tapes]),
        {name: np.concatenate([tape.targets[name] for tape in tapes]) for name in sorted(names)},
    )


def _segments(sizes: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share out `count` segments over pieces of `sizes` events that lie one behind the other.

    Returns:
        [count] int64 each: where the piece of each segment begins and ends, and where the segment does.
    """
    counts = np.ones(len(sizes), np.int64)
    for _ in range(count - len(sizes)):
        counts[int(np.argmax(np.array(sizes) / counts))] += 1
    ends = np.cumsum(sizes)
    begin, end, first = [], [], []
    for size, last, n in zip(sizes, ends.tolist(), counts.tolist(), strict=True):
        begin += [last - size] * n
        end += [last] * n
        first += [last - size + i * (size // n) for i in range(n)]
    return np.array(begin), np.array(end), np.array(first)


def _targets(joined: Tape, parts: Sequence[Tape], model: StreamTransformer, options: TrainOptions) -> dict[str, Tensor]:
    """Return what each head should say at each event of the joined parts; NaN or UNKNOWN where that is not known."""
    result = {NEXT: torch.from_numpy(np.append(joined.ids[1:], 0).astype(np.int64))}
    if GAP in model.heads:
        result[GAP] = _tensor(np.concatenate([gap_targets(part.event_ns) for part in parts]))
    if MOVE in model.heads:
        moves = [move_targets(part.targets["mid"], options.horizon) for part in parts]
        result[MOVE] = torch.from_numpy(np.concatenate(moves))
    return result


def _extra_loss(name: str, output: Tensor, target: Tensor) -> Tensor:
    if name == GAP:
        error = (target.unsqueeze(-1) - output)[~target.isnan()]
        levels = torch.tensor(GAP_LEVELS)
        return torch.maximum(levels * error, (levels - 1) * error).mean()
    known = (target != UNKNOWN).sum().clamp(min=1)
    return nn.functional.cross_entropy(output, target, ignore_index=UNKNOWN, reduction="sum") / known
