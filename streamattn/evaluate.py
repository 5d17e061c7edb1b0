"""Score a model on a tape through the streaming engine, beside its parallel form and beside simple rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamattn.checkpoint import Checkpoint
from streamattn.engine import Engine
from streamattn.errors import ConfigError
from streamattn.model import Inputs, StreamTransformer
from streamattn.ngram import best_online, static_bits
from streamattn.scheduler import Policy
from streamattn.scores import (
    GAP,
    MOVE,
    MOVES,
    NEXT,
    calibration,
    class_results,
    event_bits,
    gap_targets,
    move_targets,
    online_class_bits,
    online_quantiles,
    pinball,
)
from streamattn.tape import Tape, fingerprint, load_tape

Progress = Callable[[int, int, str], None]  # steps done, steps in all, what to show


@dataclass(frozen=True)
class Score:
    """What `evaluate` found; bits are means per event over the same events.

    Attributes:
        calibration: of the head `next`: `error` and `table`, as `streamattn.scores.Calibration` says.
        classes: of the head `next`: one entry a class, as `streamattn.scores.class_results` says.
        heads: name -> score of each further head beside its rivals.
        running: [2, events] bits of each event: the model's and the online n-gram's.
    """

    events: int
    bits_per_event: float
    parallel_bits_per_event: float
    ngram_online_bits: float
    ngram_static_bits: float
    ngram_order: int
    start: int
    stop: int
    notes: list[str] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    classes: list[dict[str, Any]] = field(default_factory=list)
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)
    running: np.ndarray = field(default_factory=lambda: np.zeros((2, 0)), repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the score as plain data for JSON, without `running`."""
        values = asdict(self)
        del values["running"]
        return values


def tape_inputs(tape: Tape, at: np.ndarray | slice) -> Inputs:
    """Return the events `at` of a tape as a model takes them."""
    ids = torch.from_numpy(tape.ids[at].astype(np.int64))
    return Inputs(ids, torch.from_numpy(tape.features[at]) if len(tape.schema.features) else None)


@torch.inference_mode()
def parallel_bits(model: StreamTransformer, tape: Tape) -> np.ndarray:
    """Return the bits of events 1 … N - 1 of a tape by the parallel form, without a cache: [N - 1] float64."""
    inputs = tape_inputs(tape, slice(None))
    assert inputs.ids is not None
    batched = Inputs(inputs.ids[None], None if inputs.features is None else inputs.features[None])
    logits = model(batched, model.parallel_context(len(tape)))[NEXT][0]
    return event_bits(logits[:-1].numpy(), tape.ids[1:])


def streaming_answers(
    model: StreamTransformer, tape: Tape, progress: Progress | None = None, frame_events: int = 64
) -> dict[str, np.ndarray]:
    """Return the heads' answers to each event of a tape pushed through an Engine: name -> [N, size] float32."""
    engine = Engine(model, lanes=1, policy=Policy(chunk=frame_events, max_chunk=max(frame_events, 256)))
    stream = engine.open(tape.name)
    answers = []
    for start in range(0, len(tape), frame_events):
        stop = min(start + frame_events, len(tape))
        features = tape.features[start:stop] if len(tape.schema.features) else None
        answers.append(stream.push(tape.ids[start:stop], features).heads)
        if progress is not None:
            progress(stop, len(tape), "scoring")
    stream.close()
    return {name: np.concatenate([heads[name] for heads in answers]) for name in answers[0]}


def streaming_bits(
    model: StreamTransformer, tape: Tape, progress: Progress | None = None, frame_events: int = 64
) -> np.ndarray:
    """Return the bits of events 1 … N - 1 of a tape pushed through an Engine: [N - 1] float64."""
    return event_bits(streaming_answers(model, tape, progress, frame_events)[NEXT][:-1], tape.ids[1:])


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
    answers = streaming_answers(checkpoint.model, part, progress)
    streamed = event_bits(answers[NEXT][:-1], part.ids[1:])
    parallel = parallel_bits(checkpoint.model, part)
    counted, notes = _counted(checkpoint, tape, trained, first)
    ids = np.concatenate([*(t.ids for t in counted), part.ids[:1]])
    symbols = tape.schema.symbols
    order, online = best_online(ids, part.ids[1:], num_symbols=len(symbols))
    static = static_bits(ids, part.ids[1:], order, num_symbols=len(symbols))
    model, parallel, rival, fixed = (round(float(bits.mean()), 6) for bits in (streamed, parallel, online, static))
    heads = {}
    if GAP in answers:
        levels = next(head.levels for head in checkpoint.model.config.heads if head.name == GAP)
        heads[GAP] = _gap_score(answers[GAP], part, counted, levels)
    if MOVE in answers and "mid" in part.targets:
        heads[MOVE] = _move_score(answers[MOVE], part, counted, checkpoint.training["heads"][MOVE]["events"])
    return Score(
        events=len(streamed),
        bits_per_event=model,
        parallel_bits_per_event=parallel,
        ngram_online_bits=rival,
        ngram_static_bits=fixed,
        ngram_order=order,
        start=first,
        stop=last,
        notes=notes,
        calibration=asdict(calibration(answers[NEXT][:-1], part.ids[1:])),
        classes=class_results(symbols, answers[NEXT][:-1], part.ids[1:], online),
        heads=heads,
        running=np.stack([streamed, online]),
    )


def _counted(
    checkpoint: Checkpoint, tape: Tape, trained: list[dict[str, Any]], first: int
) -> tuple[list[Tape], list[str]]:
    """Return the tapes that the rivals count before scoring, those that the model was trained on; and notes."""
    if trained:
        return [tape.slice(0, min(max(t["stop"] for t in trained), first))], []
    tapes, notes = [], []
    entries: dict[str, dict[str, Any]] = {}
    for entry in checkpoint.training.get("tapes", []):
        entries.setdefault(entry["fingerprint"], entry)  # the same events count only once, as they were given first
    for entry in entries.values():
        try:
            tapes.append(load_tape(entry["spec"]).slice(entry["start"], entry["stop"]))
        except ConfigError as error:
            notes.append(f"the n-gram did not count {entry['spec']}: {error}")
    return tapes, notes


# --- further heads ---------------------------------------------------------------------------------------------------


def _gap_score(answers: np.ndarray, part: Tape, counted: list[Tape], levels: tuple[float, ...]) -> dict[str, Any]:
    target = gap_targets(part.event_ns)[:-1]
    seen = np.concatenate([*(gap_targets(t.event_ns)[:-1] for t in counted), np.zeros(0)])
    before = np.append(0.0, target[:-1])  # the gap before each event
    quantiles = answers[:-1]
    rivals = {
        "online_quantiles": online_quantiles(seen, target, levels),
        "persistence": np.repeat(before[:, None], len(levels), axis=1),
    }
    return {
        "unit": "log1p(ns)",
        "levels": list(levels),
        "events": len(target),
        "pinball": _mean(pinball(quantiles, target, levels)),
        "rivals": {name: _mean(pinball(rival, target, levels)) for name, rival in rivals.items()},
        "coverage": [_mean(target <= quantiles[:, i]) for i in range(len(levels))],
        "level_pinball": [_mean(pinball(quantiles[:, [i]], target, (level,))) for i, level in enumerate(levels)],
        "level_rival": [
            _mean(pinball(rivals["online_quantiles"][:, [i]], target, (level,))) for i, level in enumerate(levels)
        ],
    }


def _move_score(answers: np.ndarray, part: Tape, counted: list[Tape], events: int) -> dict[str, Any]:
    target = move_targets(part.targets["mid"], events)
    last = _last_move(target, events)
    rivals = {}
    for name, given in (("online_frequencies", False), ("persistence", True)):
        pasts = [move_targets(t.targets["mid"], events) for t in counted if "mid" in t.targets]
        contexts = [_last_move(past, events) * given for past in pasts]
        empty = np.zeros((2, 0), np.int64)
        seen = np.concatenate([empty, *(np.stack(pair) for pair in zip(pasts, contexts, strict=True))], axis=1)
        rivals[name] = online_class_bits(seen, target, len(MOVES), events, last * given)
    known = target >= 0
    if not known.any():
        return {"horizon": events, "events": 0}
    said, wanted = answers[known], target[known]
    common = int(np.bincount(wanted).argmax())
    return {
        "horizon": events,
        "events": int(known.sum()),
        "bits": _mean(event_bits(said, wanted)),
        "rivals": {name: _mean(bits[known]) for name, bits in rivals.items()},
        "accuracy": _mean(said.argmax(1) == wanted),
        "rival_accuracy": {"most_frequent": _mean(wanted == common), "persistence": _mean(last[known] == wanted)},
        "calibration": asdict(calibration(said, wanted)),
        "classes": class_results(MOVES, said, wanted, rivals["online_frequencies"][known]),
    }


def _last_move(target: np.ndarray, events: int) -> np.ndarray:
    """Return the class of the last move that is known at each event; flat where there is none."""
    last = np.concatenate((np.ones(min(events, len(target)), np.int64), target[:-events]))
    return np.where(last < 0, 1, last)


def _mean(values: np.ndarray) -> float:
    return round(float(values.mean()), 5)


# --- picture ---------------------------------------------------------------------------------------------------------


def draw_running(score: Score, path: Path, title: str) -> None:
    """Write a picture of the running bits per event, of all events so far and of the last 1,000, to `path`.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--picture: expected matplotlib, found none; run: pip install 'streamattn[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(9, 6.5), sharex=True)
    names = ("streamattn", f"online n-gram, order {score.ngram_order}")
    at = np.arange(score.start + 1, score.start + 1 + score.events)
    width = min(1000, score.events)
    for bits, name, colour in zip(score.running, names, ("tab:blue", "tab:orange"), strict=True):
        total = bits.cumsum()
        so_far = total / np.arange(1, len(bits) + 1)
        skip = min(100, len(bits) - 1)
        axes[0].plot(at[skip:], so_far[skip:], color=colour, label=f"{name}: {so_far[-1]:.3f} at the end")
        recent = (total[width - 1 :] - np.append(0.0, total[:-width])) / width
        axes[1].plot(at[width - 1 :], recent, color=colour, label=name, linewidth=0.8)
    axes[0].set(title=title, ylabel="bits per event, all so far")
    axes[1].set(xlabel="event", ylabel=f"bits per event, last {width:,}")
    for axis in axes:
        axis.legend()
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture: expected a picture file that can be written, found {path}: {error}") from None
    finally:
        pyplot.close(figure)
