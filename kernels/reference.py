"""The specification of every attention operation, in plain PyTorch; it runs on every device.

Letters: `B` lanes in the call, `A` lanes allocated, `T` chunk, `Hq` `Hk` query and key heads, `G = Hq / Hk`, `D` head
size, `C` slots of a lane, `W` window, `P` long slots (`C = P + W`), `M` kernel features.

A lane's slab is `[long slots | window ring]`: slot `P + (p mod W)` holds position p while it is in the window; what
is kept of it afterwards lives in a long slot with an expiry, or in a kernel state. Keys are stored rotated. Whatever a
slot holds, it is read only if its position and expiry say so: memory never needs clearing and may hold NaN.

Attention is returned as a partial `(maximum, numerator, denominator)`, relative to `exp(maximum)`; `merge` joins the
partials of disjoint key sets into one softmax, `finish` divides. Sums and softmax are float32, or float64 for float64
inputs. Natural logarithms throughout. Maxima only guard against overflow and cancel, so gradients do not pass them.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import NamedTuple

import torch
from torch import Tensor

NEVER = 2**63 - 1  # expiry of a slot that is kept for good
_TWO_PI = "6.28318530717958647692528676655900576839433879875021"


class Partial(NamedTuple):
    """Softmax attention over some of the keys: `[..., 1]`, `[..., D]`, `[..., 1]`, scaled by `exp(-maximum)`."""

    maximum: Tensor
    numerator: Tensor
    denominator: Tensor


class KernelState(NamedTuple):
    """Running sums of one Kernel part, rows are lanes: `[A, Hk, M]`, `[A, Hk, M, D]`, `[A, Hk, M]`.

    Feature i's sums are scaled by `exp(-log_max[i])`. The neutral element is `log_max = -inf`; what the sums hold then
    is never read.
    """

    log_max: Tensor
    values: Tensor
    weights: Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums, softmax and states for inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- rotary positions ------------------------------------------------------------------------------------------------


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """Return turns per position as 64-bit binary fractions: `[D / 2]` int64.

    Frequency i is `theta ** (-2 i / D) / 2 pi` turns, times 2**64, wrapped into int64. A position times this, in
    wrapping int64 arithmetic, is the exact phase modulo one turn: no precision is lost however long the stream is.
    """
    with localcontext() as context:
        context.prec = 60
        base, turn = Decimal(theta), Decimal(_TWO_PI)
        turns = [(base ** (Decimal(-2 * i) / head_dim)) / turn for i in range(head_dim // 2)]
        wrapped = [int((t * 2**64).to_integral_value()) % 2**64 for t in turns]
    return torch.tensor([w - 2**64 if w >= 2**63 else w for w in wrapped], dtype=torch.int64)


def rope_table(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of each position's angles, `[..., D / 2]` in `dtype`.

    Args:
        positions: [...] int64.
        frequencies: [D / 2] int64, of `rope_frequencies`.
    """
    phase = positions.unsqueeze(-1) * frequencies  # wraps: only the fraction of a turn is left
    angle = phase.to(torch.float64) * (2.0 * math.pi / 2.0**64)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x with the pairs `(x[i], x[i + D / 2])` rotated (RoFormer, arXiv 2104.09864; Llama's choice of pairs).

    Args:
        x: [..., H, D].
        cos, sin: [..., D / 2], the same for all heads.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


# --- partial softmax -------------------------------------------------------------------------------------------------


def merge(partials: list[Partial]) -> Partial:
    """Return the attention over the union of disjoint key sets."""
    if len(partials) == 1:
        return partials[0]
    maximum = partials[0].maximum
    for partial in partials[1:]:
        maximum = torch.maximum(maximum, partial.maximum)
    safe = torch.where(maximum.isinf(), 0.0, maximum)
    weights = [torch.exp(partial.maximum - safe) for partial in partials]
    numerator = torch.stack([p.numerator * w for p, w in zip(partials, weights, strict=True)]).sum(0)
    denominator = torch.stack([p.denominator * w for p, w in zip(partials, weights, strict=True)]).sum(0)
    return Partial(maximum, numerator, denominator)


def finish(partial: Partial) -> Tensor:
    """Return numerator / denominator; zeros where nothing was visible."""
    empty = partial.denominator == 0
    return torch.where(empty, 0.0, partial.numerator / torch.where(empty, 1.0, partial.denominator))


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Partial:
    """Return the partial attention of grouped queries over explicit keys.

    Args:
        q: [B, T, Hq, D], rotated.
        k, v: [B, Hk, N, D], rotated; may hold anything where not visible.
        visible: bool, broadcastable to [B, Hk, T, N]; None if all is visible.
        scale: factor of the logits.

    Returns:
        Partial of [B, T, Hq, 1 or D].
    """
    B, T, Hq, D = q.shape
    Hk = k.shape[1]
    acc = accumulator_dtype(q.dtype)
    if k.shape[2] == 0:
        nothing = q.new_zeros((B, T, Hq, 1), dtype=acc)
        return Partial(nothing - math.inf, q.new_zeros(q.shape, dtype=acc), nothing)
    grouped = q.view(B, T, Hk, Hq // Hk, D).permute(0, 2, 3, 1, 4).reshape(B, Hk, -1, D)  # [B, Hk, G * T, D]
    logits = (grouped @ k.transpose(-1, -2)).to(acc) * scale
    if visible is not None:
        logits = logits.view(B, Hk, -1, T, k.shape[2]).masked_fill(~visible.unsqueeze(2), -math.inf).flatten(2, 3)
        seen = visible.any(dim=-2).unsqueeze(-1)  # [B, Hk, N, 1]
        v = torch.where(seen, v, 0.0)
    maximum = logits.detach().amax(-1, keepdim=True)
    weights = torch.exp(logits - torch.where(maximum.isinf(), 0.0, maximum))
    numerator = (weights.to(v.dtype) @ v).to(acc)
    denominator = weights.sum(-1, keepdim=True)

    def ungroup(x: Tensor) -> Tensor:
        return x.view(B, Hk, Hq // Hk, T, -1).permute(0, 3, 1, 2, 4).reshape(B, T, Hq, -1)

    return Partial(ungroup(maximum), ungroup(numerator), ungroup(denominator))


# --- one token a lane ------------------------------------------------------------------------------------------------


def hand_off(k: Tensor, v: Tensor, expire: Tensor, lanes: Tensor, source: Tensor, slot: Tensor, until: Tensor) -> None:
    """Copy the key that leaves each lane's window into its long slot.

    Args:
        k, v: [A, Hk, C, D] slabs. Mutated.
        expire: [A, Hk, P] int64. Mutated.
        lanes: [B] int64 rows of the slabs, each at most once.
        source: [B] int64 ring slot (index into C) that holds the key.
        slot: [B] int64 long slot that takes it, or -1: nothing is copied.
        until: [B] int64 its expiry.
    """
    taken = slot >= 0
    lanes, source, slot, until = lanes[taken], source[taken], slot[taken], until[taken]
    k[lanes, :, slot] = k[lanes, :, source]
    v[lanes, :, slot] = v[lanes, :, source]
    expire[lanes, :, slot] = until[:, None]


def append(k: Tensor, v: Tensor, lanes: Tensor, slot: Tensor, k_new: Tensor, v_new: Tensor) -> None:
    """Write one rotated key and value a lane.

    Args:
        k, v: [A, Hk, C, D] slabs. Mutated.
        lanes: [B] int64, each at most once.
        slot: [B] int64 index into C, or -1: nothing is written.
        k_new, v_new: [B, Hk, D].
    """
    written = slot >= 0
    if not bool(written.all()):
        lanes, slot, k_new, v_new = lanes[written], slot[written], k_new[written], v_new[written]
    k[lanes, :, slot] = k_new.to(k.dtype)
    v[lanes, :, slot] = v_new.to(v.dtype)


def slot_visibility(position: Tensor, expire: Tensor, window: int) -> Tensor:
    """Return which slots the query at `position` sees after its own append: [B, Hk or 1, C] bool.

    Args:
        position: [B] int64; -1 sees nothing.
        expire: [B, Hk, P] int64 of the same lanes; P may be 0.
        window: W, may be 0.
    """
    t = position[:, None, None]
    ring = torch.arange(window, device=position.device)
    age = torch.remainder(t - ring, max(window, 1))  # of the position that ring slot holds
    in_window = (t >= 0) & (t - age >= 0)
    in_long = (t >= 0) & (t < expire)
    if expire.shape[2] == 0:
        return in_window
    return torch.cat((in_long, in_window.expand(-1, expire.shape[1], -1)), dim=-1)


def ring_decode(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    cos: Tensor,
    sin: Tensor,
    k: Tensor,
    v: Tensor,
    expire: Tensor,
    lanes: Tensor,
    position: Tensor,
    window: int,
    scale: float,
) -> Partial:
    """Rotate q and the new key, append, and attend over `[long slots | window]`: one token of each lane.

    Hand-off comes before this call. A lane at position -1 is idle: nothing is written and its result is empty.

    Args:
        q: [B, Hq, D] unrotated.
        k_new, v_new: [B, Hk, D] unrotated.
        cos, sin: [B, D / 2] of `position`.
        k, v: [A, Hk, C, D] slabs. Mutated at the ring slot of `position`.
        expire: [A, Hk, P] int64.
        lanes: [B] int64 rows of the slabs, each at most once.
        position: [B] int64.
        window: W >= 1.
        scale: factor of the logits.

    Returns:
        Partial of [B, Hq, 1 or D].
    """
    slot = torch.where(position >= 0, expire.shape[2] + torch.remainder(position, window), -1)
    append(k, v, lanes, slot, rotate(k_new, cos, sin), v_new)
    visible = slot_visibility(position, expire[lanes], window)
    partial = attend(rotate(q, cos, sin).unsqueeze(1), k[lanes], v[lanes], visible.unsqueeze(2), scale)
    return Partial(*(x.squeeze(1) for x in partial))


# --- kernel state (Performer, arXiv 2009.14794) ----------------------------------------------------------------------


def log_features(x: Tensor, omega: Tensor, scale: float) -> Tensor:
    """Return the logarithm of the positive random features of x: `[..., H, M]`, at least float32.

    `exp(log_features(q)) . exp(log_features(k))` estimates `exp(scale q . k)` without bias (Lemma 1 of the paper).

    Args:
        x: [..., H, D].
        omega: [H, M, D] random projections.
    """
    acc = accumulator_dtype(x.dtype)
    scaled = x.to(acc) * math.sqrt(scale)
    projected = torch.einsum("...hd,hmd->...hm", scaled, omega.to(acc))
    return projected - scaled.square().sum(-1, keepdim=True) / 2 - math.log(omega.shape[1]) / 2


def kernel_update(state: KernelState, log_key: Tensor, value: Tensor, taken: Tensor, log_decay: float) -> KernelState:
    """Return the state after one step: everything decays, then the keys handed on are added.

    Args:
        state: rows for the B lanes of the call.
        log_key: [B, Hk, M] log-features of the key handed on.
        value: [B, Hk, D].
        taken: [B] bool: whether a key is handed on in this step. Where not, `log_key` and `value` may hold anything.
        log_decay: logarithm of the factor by which the state fades in one step, <= 0.
    """
    add = taken[:, None, None]
    decayed = state.log_max + log_decay
    log_key = torch.where(add, log_key, -math.inf)
    log_max = torch.maximum(decayed, log_key.detach())
    safe = torch.where(log_max.isinf(), 0.0, log_max)
    fresh = state.log_max.isinf()  # the sums hold nothing yet
    keep = torch.exp(decayed - safe)
    gain = torch.exp(log_key - safe)
    value = torch.where(add, value.to(log_key.dtype), 0.0).unsqueeze(-2)
    values = torch.where(fresh.unsqueeze(-1), 0.0, state.values) * keep.unsqueeze(-1) + gain.unsqueeze(-1) * value
    weights = torch.where(fresh, 0.0, state.weights) * keep + gain
    return KernelState(log_max, values, weights)


def kernel_read(state: KernelState, log_query: Tensor) -> Partial:
    """Return the partial attention of the queries over everything in the state.

    Args:
        state: rows for the B lanes of the call.
        log_query: [B, Hq, M] log-features of the queries.

    Returns:
        Partial of [B, Hq, 1 or D].
    """
    B, Hq, M = log_query.shape
    Hk = state.log_max.shape[1]
    logits = log_query.view(B, Hk, Hq // Hk, M) + state.log_max.unsqueeze(2)
    maximum = logits.detach().amax(-1, keepdim=True)
    empty = maximum.isinf()
    weights = torch.exp(logits - torch.where(empty, 0.0, maximum))
    fresh = state.log_max.isinf()
    numerator = weights @ torch.where(fresh.unsqueeze(-1), 0.0, state.values)
    denominator = weights @ torch.where(fresh, 0.0, state.weights).unsqueeze(-1)
    return Partial(maximum.reshape(B, Hq, 1), numerator.reshape(B, Hq, -1), denominator.reshape(B, Hq, 1))
