"""Fit a small StreamTransformer to recorded tapes, and score one through the streaming engine.

Training cuts each tape into parallel segments and walks them chunk by chunk with the cache carried on, so the model
meets full rings, wrap-around and hand-off exactly as a stream does; gradients stay within a chunk. Everything random
comes from one seed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from streamattn.checkpoint import Checkpoint
from streamattn.context import Rows, StreamContext
from streamattn.engine import Engine
from streamattn.errors import ConfigError
from streamattn.model import Head, Inputs, ModelConfig, StreamTransformer
from streamattn.ngram import best_online, static_bits
from streamattn.pattern import Global, Pattern, Window
from streamattn.scheduler import Policy
from streamattn.scores import event_bits
from streamattn.tape import Tape, load_tape, mirrored

HEAD = "next"  # the head that predicts the next event's id
Progress = Callable[[int, int, str], None]  # steps done, steps in all, what to show


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

    def __post_init__(self) -> None:
        for name in ("fraction", "validation"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ConfigError(f"{name}: expected between 0 and 1, found {getattr(self, name)}")
        for name in ("segments", "chunk", "epochs", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected >= 1, found {getattr(self, name)}")

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
    if options.mirror:
        fitted += [mirrored(tape) for tape in fitted]
    held_out = [tape.slice(int(len(tape) * (1 - options.validation)), len(tape)) for tape in used.values()]
    torch.manual_seed(options.seed)
    model = _new_model(fitted, options)
    fit = _Fit(model, fitted, held_out, options, progress)
    fit.run()
    return Checkpoint(
        model.eval(),
        schema,
        {
            "tapes": [
                {"spec": spec, "fingerprint": fingerprint(tapes[spec]), "start": 0, "stop": len(tape)}
                for spec, tape in used.items()
            ],
            "options": {name: getattr(options, name) for name in options.__dataclass_fields__},
            "validation_bits": round(fit.best_bits, 5),
            "epochs": fit.epochs_run,
        },
    )


def fingerprint(tape: Tape) -> str:
    """Return a hash of a tape's events: times and ids."""
    digest = hashlib.sha256(np.ascontiguousarray(tape.event_ns, "<i8").tobytes())
    digest.update(np.ascontiguousarray(tape.ids, "<i4").tobytes())
    return digest.hexdigest()


def _new_model(tapes: Sequence[Tape], options: TrainOptions) -> StreamTransformer:
    schema = tapes[0].schema
    features = np.concatenate([tape.features for tape in tapes]).astype(np.float64)
    mean, std = features.mean(0), features.std(0)
    config = ModelConfig(
        patterns=(options.pattern(),) * options.layers,
        width=options.width,
        q_heads=options.q_heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        ffn=options.ffn,
        heads=(Head(HEAD, "logits", len(schema.symbols)),),
        vocab=len(schema.symbols),
        features=len(schema.features),
    )
    model = StreamTransformer(config, _tensor(mean), _tensor(np.where(std > 0, std, 1.0)))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, 0.0, 0.02)
        if name.endswith(("output.weight", "down.weight")):  # the residual stream keeps its size with depth
            nn.init.normal_(parameter, 0.0, 0.02 / math.sqrt(2 * options.layers))
    return model


def _tensor(values: np.ndarray) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


class _Fit:
    """One training run."""

    def __init__(
        self,
        model: StreamTransformer,
        fitted: Sequence[Tape],
        held_out: Sequence[Tape],
        options: TrainOptions,
        progress: Progress | None,
    ) -> None:
        self.model, self.options, self.progress = model, options, progress
        self.fitted, self.held_out = fitted, held_out
        self.random = np.random.default_rng(options.seed)
        self.length = sum(len(tape) for tape in fitted) // options.segments  # events of one segment
        self.steps_per_epoch = (self.length - 1) // options.chunk
        shortest = min(len(tape) for tape in (*fitted, *held_out))
        if self.steps_per_epoch < 1 or shortest < 2 * options.chunk:
            raise ConfigError(
                f"tape: expected at least {2 * options.segments * options.chunk} events to train on, found "
                f"{sum(len(t) for t in fitted)}; use fewer segments or shorter chunks"
            )
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
        tape = _join(self.fitted)
        starts = self._starts(len(tape.ids))
        cache = self.model.new_cache(options.segments)
        rows = Rows(list(range(options.segments)), [options.chunk] * options.segments)
        losses = []
        self.model.train()
        for step in range(self.steps_per_epoch):
            at = starts[:, None] + step * options.chunk + np.arange(options.chunk)
            loss = self._loss(tape, at, cache, rows)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
            for group in self.optimiser.param_groups:
                group["lr"] = options.learning_rate * self._schedule()
            self.optimiser.step()
            losses.append(float(loss.detach()))
            self.done += 1
            if self.progress is not None and step % 10 == 0:
                self._report(f"training {np.mean(losses[-50:]) / math.log(2):.4f} bits")
        return float(np.mean(losses)) / math.log(2)

    def _starts(self, events: int) -> np.ndarray:
        """Return where each segment begins: spread evenly, shifted by a random amount each epoch."""
        used = self.steps_per_epoch * self.options.chunk + 1
        spread = np.arange(self.options.segments) * self.length
        return np.minimum(spread + self.random.integers(0, max(self.length - used, 0) + 1), events - used)

    def _loss(self, tape: Tape, at: np.ndarray, cache: Any, rows: Rows) -> Tensor:
        context = StreamContext(cache, rows, self.model.config.scale)
        logits = self.model(_inputs(tape, at.ravel()), context)[HEAD]
        context.commit()
        return nn.functional.cross_entropy(logits, torch.from_numpy(tape.ids[at.ravel() + 1].astype(np.int64)))

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
    if len(tapes) == 1:
        return tapes[0]
    return Tape(
        "+".join(tape.name for tape in tapes),
        tapes[0].schema,
        np.concatenate([tape.event_ns for tape in tapes]),
        np.concatenate([tape.ids for tape in tapes]),
        np.concatenate([tape.features for tape in tapes]),
    )


def _inputs(tape: Tape, at: np.ndarray | slice) -> Inputs:
    ids = torch.from_numpy(tape.ids[at].astype(np.int64))
    return Inputs(ids, torch.from_numpy(tape.features[at]) if len(tape.schema.features) else None)


# --- scores ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def parallel_bits(model: StreamTransformer, tape: Tape) -> np.ndarray:
    """Return the bits of events 1 … N - 1 of a tape by the parallel form, without a cache: [N - 1] float64."""
    inputs = _inputs(tape, slice(None))
    assert inputs.ids is not None
    batched = Inputs(inputs.ids[None], None if inputs.features is None else inputs.features[None])
    logits = model(batched, model.parallel_context(len(tape)))[HEAD][0]
    return event_bits(logits[:-1].numpy(), tape.ids[1:])


def streaming_bits(
    model: StreamTransformer, tape: Tape, progress: Progress | None = None, frame_events: int = 64
) -> np.ndarray:
    """Return the bits of events 1 … N - 1 of a tape pushed through an Engine: [N - 1] float64."""
    engine = Engine(model, lanes=1, policy=Policy(chunk=frame_events, max_chunk=max(frame_events, 256)))
    stream = engine.open(tape.name)
    logits = []
    for start in range(0, len(tape), frame_events):
        stop = min(start + frame_events, len(tape))
        features = tape.features[start:stop] if len(tape.schema.features) else None
        logits.append(stream.push(tape.ids[start:stop], features).heads[HEAD])
        if progress is not None:
            progress(stop, len(tape), "scoring")
    stream.close()
    return event_bits(np.concatenate(logits)[:-1], tape.ids[1:])


@dataclass(frozen=True)
class Score:
    """What `evaluate` found; bits are means per event over the same events."""

    events: int
    bits_per_event: float
    parallel_bits_per_event: float
    ngram_online_bits: float
    ngram_static_bits: float
    ngram_order: int
    start: int
    stop: int
    notes: list[str] = field(default_factory=list)


def evaluate(
    checkpoint: Checkpoint,
    tape: Tape,
    *,
    start: int | None = None,
    stop: int | None = None,
    allow_overlap: bool = False,
    progress: Progress | None = None,
) -> Score:
    """Score a model on part of a tape, through the engine and in parallel, beside an n-gram on the same events.

    The n-gram counts what the model was trained on, then (online) goes on counting while it is scored; its order is
    the best one in hindsight. The first event of the range is context for all of them and is not scored.

    Args:
        checkpoint: the model and what it was trained on.
        tape: the events.
        start, stop: range of events; by default what follows the trained part of a tape that was trained on, and
            all of an unseen one.
        allow_overlap: whether events that were trained on may be scored.
        progress: called while scoring.

    Raises:
        ConfigError: another schema, an empty range, or overlap with the trained part.
    """
    checkpoint.schema.check_same(tape.schema)
    trained = [t for t in checkpoint.training.get("tapes", []) if t["fingerprint"] == fingerprint(tape)]
    first = start if start is not None else max((t["stop"] for t in trained), default=0)
    last = stop if stop is not None else len(tape)
    if not 0 <= first < last - 1 < len(tape):
        raise ConfigError(f"range: expected at least two of {len(tape)} events, found {first} to {last}")
    if not allow_overlap and any(first < t["stop"] and t["start"] < last for t in trained):
        raise ConfigError(
            f"range: events {first} to {last} overlap with what the model was trained on; allow it with --allow-overlap"
        )
    part = tape.slice(first, last)
    streamed = streaming_bits(checkpoint.model, part, progress)
    parallel = parallel_bits(checkpoint.model, part)
    counted, notes = _counted(checkpoint, tape, trained, first)
    order, online = best_online(counted, part.ids[1:], num_symbols=len(tape.schema.symbols))
    static = static_bits(counted, part.ids[1:], order, num_symbols=len(tape.schema.symbols))
    means = [round(float(bits.mean()), 6) for bits in (streamed, parallel, online, static)]
    return Score(len(streamed), means[0], means[1], means[2], means[3], order, first, last, notes)


def _counted(
    checkpoint: Checkpoint, tape: Tape, trained: list[dict[str, Any]], first: int
) -> tuple[np.ndarray, list[str]]:
    """Return the ids that the n-gram counts before scoring: what the model was trained on, and the event at `first`."""
    if trained:
        stop = min(max(t["stop"] for t in trained), first)
        return np.append(tape.ids[:stop], tape.ids[first : first + 1]) if stop < first else tape.ids[: first + 1], []
    ids, notes = [], []
    for entry in checkpoint.training.get("tapes", []):
        try:
            ids.append(load_tape(entry["spec"]).ids[entry["start"] : entry["stop"]])
        except ConfigError as error:
            notes.append(f"the n-gram did not count {entry['spec']}: {error}")
    return np.concatenate([*ids, tape.ids[first : first + 1]]), notes
