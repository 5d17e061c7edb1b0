"""How predictions are scored. Needs no torch."""

from __future__ import annotations

import math

import numpy as np


def event_bits(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return -log2 of the softmax of `logits` [N, V] at `ids` [N]: [N] float64."""
    logits = logits.astype(np.float64)
    peak = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - peak).sum(axis=1)) + peak[:, 0]
    return (total - logits[np.arange(len(ids)), ids]) / math.log(2)
