"""What a model is asked to foretell, how its answers are scored, and the simple rivals beside it. Needs no torch.

Three heads: `next`, the id of the next event (logits); `gap`, the time until it (quantiles of `log1p(ns)`); `move`, the
sign of the change of the middle price over the next k events (classes down, flat, up). The answer to event t is scored
against what follows t. Every rival sees what the model could have seen: a target counts only once it has come true.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

NEXT, GAP, MOVE = "next", "gap", "move"
GAP_LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
MOVES = ("down", "flat", "up")
UNKNOWN = -1  # class of a move that the tape does not tell

# --- targets ---------------------------------------------------------------------------------------------------------


def gap_targets(event_ns: np.ndarray) -> np.ndarray:
    """Return log1p of the nanoseconds from each event to the next: [N] float64, NaN for the last."""
    return np.append(np.log1p(np.diff(event_ns).astype(np.float64)), np.nan)


def move_targets(mid: np.ndarray, events: int) -> np.ndarray:
    """Return the class in `MOVES` of the change of the middle price over the next `events` events.

    Args:
        mid: [N] float64, NaN where there is none.
        events: 1 or more.

    Returns:
        [N] int64, `UNKNOWN` where either price is missing or lies beyond the tape.
    """
    change = np.full(len(mid), np.nan)
    change[: max(len(mid) - events, 0)] = mid[events:] - mid[:-events]
    return np.where(np.isnan(change), UNKNOWN, np.sign(np.nan_to_num(change)) + 1).astype(np.int64)


# --- scores ----------------------------------------------------------------------------------------------------------


def event_bits(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return -log2 of the softmax of `logits` [N, V] at `ids` [N]: [N] float64."""
    logits = logits.astype(np.float64)
    peak = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - peak).sum(axis=1)) + peak[:, 0]
    return (total - logits[np.arange(len(ids)), ids]) / math.log(2)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis of `logits` [N, V]: [N, V] float64."""
    logits = logits.astype(np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def pinball(quantiles: np.ndarray, target: np.ndarray, levels: tuple[float, ...]) -> np.ndarray:
    """Return the mean pinball loss over the levels of `quantiles` [N, Q] at `target` [N]: [N] float64."""
    error = target[:, None] - quantiles.astype(np.float64)
    level = np.array(levels)
    return np.maximum(level * error, (level - 1) * error).mean(axis=1)


@dataclass(frozen=True)
class Calibration:
    """How far stated chances hold.

    Attributes:
        error: expected calibration error: mean |stated chance - share that came true| of the likeliest class, in ten
            bins of the stated chance, weighted by their counts (Guo et al., 2017, equation 3).
        table: one entry a bin that is not empty: `low, high` of the bin, `count`, mean `stated`, `found` share.
    """

    error: float
    table: list[dict[str, float]]


def calibration(logits: np.ndarray, classes: np.ndarray, bins: int = 10) -> Calibration:
    """Return the calibration of the softmax of `logits` [N, V] for the true `classes` [N]."""
    chances = softmax(logits)
    stated, found = chances.max(axis=1), chances.argmax(axis=1) == classes
    bin_of = np.minimum((stated * bins).astype(np.int64), bins - 1)
    table, error = [], 0.0
    for i in range(bins):
        inside = bin_of == i
        if inside.any():
            row = {"low": i / bins, "high": (i + 1) / bins, "count": int(inside.sum())}
            row |= {"stated": round(float(stated[inside].mean()), 5), "found": round(float(found[inside].mean()), 5)}
            error += row["count"] * abs(row["stated"] - row["found"])
            table.append(row)
    return Calibration(round(error / max(len(classes), 1), 6), table)


def class_results(
    names: tuple[str, ...], logits: np.ndarray, classes: np.ndarray, rival_bits: np.ndarray
) -> list[dict[str, Any]]:
    """Return one entry for each class that occurs: how often, at what bits beside the rival's, how often it was found.

    Args:
        names: of the classes.
        logits: [N, V].
        classes: [N] ints, the true ones.
        rival_bits: [N], of the same events.

    Returns:
        `name, count, bits, rival_bits, recall` (share of its events where it was the likeliest class) and `precision`
        (share of the events where it was the likeliest class that were it; None if it never was).
    """
    bits, likeliest = event_bits(logits, classes), logits.argmax(axis=1)
    result = []
    for i, name in enumerate(names):
        is_it, said = classes == i, likeliest == i
        if is_it.any():
            result.append(
                {
                    "name": name,
                    "count": int(is_it.sum()),
                    "bits": round(float(bits[is_it].mean()), 4),
                    "rival_bits": round(float(rival_bits[is_it].mean()), 4),
                    "recall": round(float(said[is_it].mean()), 4),
                    "precision": round(float(is_it[said].mean()), 4) if said.any() else None,
                }
            )
    return result


# --- simple rivals ---------------------------------------------------------------------------------------------------

_BINS_PER_UNIT = 50


def online_quantiles(seen: np.ndarray, target: np.ndarray, levels: tuple[float, ...]) -> np.ndarray:
    """Return the empirical quantiles of all targets before each one, those of `seen` included: [N, Q] float64.

    Args:
        seen: [M] float64, 0 or more, counted beforehand.
        target: [N] float64, 0 or more.
        levels: of the quantiles.
    """
    top = int(max(seen.max(initial=0.0), target.max(initial=0.0)) * _BINS_PER_UNIT) + 1
    bins = (target * _BINS_PER_UNIT).astype(np.int64)
    counts = np.bincount((seen * _BINS_PER_UNIT).astype(np.int64), minlength=top).astype(np.float64)
    level = np.array(levels)
    result = np.zeros((len(target), len(levels)))
    for i, found in enumerate(bins.tolist()):
        total = np.cumsum(counts)
        if total[-1]:
            result[i] = np.searchsorted(total, level * total[-1])
        counts[found] += 1
    return (result + 0.5) / _BINS_PER_UNIT * (result > 0)


def online_class_bits(seen: np.ndarray, classes: np.ndarray, size: int, delay: int, given: np.ndarray) -> np.ndarray:
    """Return -log2 of the frequency of each class among those known so far, given a context: [N] float64.

    Args:
        seen: [2, M] ints, classes and contexts counted beforehand.
        classes: [N] ints; `UNKNOWN` ones are not counted and cost nothing.
        size: number of classes; each starts with half a count.
        delay: events until a class is known.
        given: [N] ints, the context of each: frequencies are counted apart for each. All zeros for none.
    """
    counts = np.full((int(max(seen[1].max(initial=0), given.max(initial=0))) + 1, size), 0.5)
    for known, context in seen.T.tolist():
        if known >= 0:
            counts[context, known] += 1
    result = np.zeros(len(classes))
    for i in range(len(classes)):
        if i >= delay and classes[i - delay] >= 0:
            counts[given[i - delay], classes[i - delay]] += 1
        if classes[i] >= 0:
            row = counts[given[i]]
            result[i] = -math.log2(row[classes[i]] / row.sum())
    return result
