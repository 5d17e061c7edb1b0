"""Brute-force truth for attention on streams, in plain Python and float64 NumPy. Shares no code with the package's.

`live` follows design §4 word for word: it walks a token's life from its arrival to the query, one part after another.
"""

from __future__ import annotations

import math

import numpy as np

from streamattn.pattern import Global, Kernel, Pattern, Strided, Window


def owner(pattern: Pattern, j: int, pins: dict[int, tuple[int, float]]) -> tuple[object, float]:
    """Return the part that takes key j when it leaves the window, and when that part forgets it."""
    window = sum(p.size for p in pattern.parts if isinstance(p, Window))
    leaves = j + window
    for part in pattern.parts:
        if isinstance(part, Global):
            if j < part.first:
                return part, math.inf
            pinned_at, unpinned_at = pins.get(j, (math.inf, -math.inf))
            if pinned_at <= leaves < unpinned_at:
                return part, unpinned_at
        elif isinstance(part, Strided):
            if j % part.every in range(part.every - part.width, part.every):
                return part, leaves + part.keep * part.every
        elif isinstance(part, Kernel):
            return part, math.inf
    return None, leaves


def live(pattern: Pattern, t: int, j: int, pins: dict[int, tuple[int, float]]) -> str:
    """Return how the query at t sees the key at j: "index", "kernel" or "" (not at all).

    `pins` maps a position to (first query position under the pin, first one after unpin).
    """
    window = sum(p.size for p in pattern.parts if isinstance(p, Window))
    if not 0 <= j <= t:
        return ""
    if t - j < window:
        return "index"
    part, forgotten = owner(pattern, j, pins)
    if part is None or t >= forgotten:
        return ""
    return "kernel" if isinstance(part, Kernel) else "index"


def attention(
    pattern: Pattern,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    unrotated: tuple[np.ndarray, np.ndarray] | None = None,
    omega: np.ndarray | None = None,
    pins: dict[int, tuple[int, float]] | None = None,
) -> np.ndarray:
    """Return softmax attention of one sequence in float64, one query after another: [N, Hq, D].

    q: [N, Hq, D], k, v: [N, Hk, D], already rotated; `unrotated` q and k and omega [Hk, M, D] for a Kernel part.
    """
    window = sum(p.size for p in pattern.parts if isinstance(p, Window))
    N, Hq, _ = q.shape
    group = Hq // k.shape[1]
    out = np.zeros(q.shape)
    for t in range(N):
        for h in range(Hq):
            weights, values = [], []
            for j in range(t + 1):
                how = live(pattern, t, j, pins or {})
                key, value = k[j, h // group], v[j, h // group]
                if how == "index":
                    weights.append(math.exp(scale * float(q[t, h] @ key)))
                    values.append(value)
                elif how == "kernel":
                    assert omega is not None
                    assert unrotated is not None
                    assert pattern.kernel is not None
                    query = _features(unrotated[0][t, h], omega[h // group], scale)
                    memory = _features(unrotated[1][j, h // group], omega[h // group], scale)
                    weights.append(pattern.kernel.decay ** (t - j - window) * float(query @ memory))
                    values.append(value)
            if weights:
                out[t, h] = np.array(weights) @ np.array(values) / sum(weights)
    return out


def _features(x: np.ndarray, omega: np.ndarray, scale: float) -> np.ndarray:
    x = x * math.sqrt(scale)
    return np.exp(omega @ x - x @ x / 2) / math.sqrt(len(omega))


def rotate(x: np.ndarray, theta: float, start: int = 0) -> np.ndarray:
    """Return [N, H, D] rotated by Llama's convention at positions start, start + 1, …, in float64."""
    N, _, D = x.shape
    angle = (start + np.arange(N))[:, None] * theta ** (-np.arange(0, D, 2) / D)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)
