"""One token of each lane in one launch: rotate q and the new key, append, attend over `[long slots | window ring]`.

    maximum = max_j s_j,  numerator = sum_j exp(s_j - maximum) v_j,  denominator = sum_j exp(s_j - maximum),
    s_j = scale * q . k_j  over the visible slots j and the new key.

Letters as in `reference.py`. One program owns one (lane, key head): it reads that head's slots for the G queries that
share them and is the only one to write there, so the result needs no second launch and does not depend on scheduling.
The slot the new key goes to is left out of every load and the new key is folded in from registers: no read is ordered
after the write. The online softmax is that of FlashAttention (arXiv 2205.14135). What is not done here: hand-off,
gradients, float64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamattn.kernels.reference import Partial

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256


@triton.jit
def _rotated(x_ptr, x_mask, cos, sin, d, D: tl.constexpr):
    # The pair of d is d + D / 2, modulo D. Both products and the sum are rounded to the dtype, as PyTorch rounds them.
    first = d < D // 2
    x = tl.load(x_ptr + d, mask=x_mask, other=0.0)
    pair = tl.load(x_ptr + tl.where(first, d + D // 2, d - D // 2), mask=x_mask, other=0.0)
    straight = (x.to(tl.float32) * cos).to(x.dtype).to(tl.float32)
    crossed = (pair.to(tl.float32) * sin).to(x.dtype).to(tl.float32)
    return (straight + tl.where(first, -crossed, crossed)).to(x.dtype)


@triton.jit
def _absorb(maximum, numerator, denominator, query, k_ptr, v_ptr, slot, seen, d, scale, D: tl.constexpr):
    # One tile of slots into the running softmax. Slots that are not seen are not read: they may hold NaN.
    offset = slot[:, None] * D + d[None, :]
    mask = seen[:, None] & (d < D)[None, :]
    key = tl.load(k_ptr + offset, mask=mask, other=0.0)
    value = tl.load(v_ptr + offset, mask=mask, other=0.0)
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale  # [BLOCK_G, BLOCK_N]
    logits = tl.where(seen[None, :], logits, float("-inf"))
    higher = tl.maximum(maximum, tl.max(logits, 1))  # finite: the new key is in `maximum` from the start
    weights = tl.exp(logits - higher[:, None])
    fade = tl.exp(maximum - higher)
    added = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return higher, numerator * fade[:, None] + added, denominator * fade + tl.sum(weights, 1)


@triton.jit(
    do_not_specialize=["lane_slots", "long_slots", "window", "q_row", "q_head", "k_row", "k_head", "v_row", "v_head"]
)
def _ring_decode_kernel(
    q_ptr,  # [B, Hq, D]
    k_new_ptr,  # [B, Hk, D]
    v_new_ptr,
    cos_ptr,  # [B, D / 2]
    sin_ptr,
    k_ptr,  # [A, Hk, C, D]
    v_ptr,
    expire_ptr,  # [A, Hk, P]
    lanes_ptr,  # [B]
    position_ptr,  # [B]
    maximum_ptr,  # [B, Hq]
    numerator_ptr,  # [B, Hq, D]
    denominator_ptr,  # [B, Hq]
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    lane_slots,
    long_slots,
    window,
    scale,
    Hk: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    group, inside = g < G, d < D
    both = group[:, None] & inside[None, :]
    out = (batch * Hk + head) * G + g
    t = tl.load(position_ptr + batch)
    if t < 0:  # idle: nothing is written to the slabs, and the partial is empty
        tl.store(maximum_ptr + out, tl.full([BLOCK_G], float("-inf"), tl.float32), mask=group)
        tl.store(denominator_ptr + out, tl.zeros([BLOCK_G], tl.float32), mask=group)
        empty = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        tl.store(numerator_ptr + out[:, None] * D + d[None, :], empty, mask=both)
        return

    angle = batch * (D // 2) + d % (D // 2)
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    queries = batch * q_row + (head * G + g) * q_head
    query = _rotated(q_ptr + queries[:, None], both, cos[None, :], sin[None, :], d[None, :], D)
    key = _rotated(k_new_ptr + batch * k_row + head * k_head, inside, cos, sin, d, D)
    value = tl.load(v_new_ptr + batch * v_row + head * v_head + d, mask=inside, other=0.0)

    lane_head = tl.load(lanes_ptr + batch) * Hk + head
    taken = (t % window).to(tl.int32)  # ring slot of the new key
    k_long = k_ptr + lane_head * lane_slots * D
    v_long = v_ptr + lane_head * lane_slots * D
    k_ring = k_long + long_slots * D
    v_ring = v_long + long_slots * D
    tl.store(k_ring + taken * D + d, key, mask=inside)
    tl.store(v_ring + taken * D + d, value, mask=inside)

    maximum = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale
    numerator = tl.zeros([BLOCK_G, BLOCK_D], tl.float32) + value.to(tl.float32)[None, :]
    denominator = tl.full([BLOCK_G], 1.0, tl.float32)
    for start in range(0, long_slots, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        expire = tl.load(expire_ptr + lane_head * long_slots + slot, mask=slot < long_slots, other=0)
        maximum, numerator, denominator = _absorb(
            maximum, numerator, denominator, query, k_long, v_long, slot, t < expire, d, scale, D
        )
    filled = tl.minimum(t + 1, window).to(tl.int32)  # ring slots are first taken in order
    for start in range(0, filled, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        seen = (slot < filled) & (slot != taken)
        maximum, numerator, denominator = _absorb(
            maximum, numerator, denominator, query, k_ring, v_ring, slot, seen, d, scale, D
        )
    tl.store(maximum_ptr + out, maximum, mask=group)
    tl.store(denominator_ptr + out, denominator, mask=group)
    tl.store(numerator_ptr + out[:, None] * D + d[None, :], numerator, mask=both)


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
    """Return what `reference.ring_decode` returns, in one launch; what is appended is equal to the bit.

    Args:
        q: [B, Hq, D] unrotated, heads and rows at any stride. D <= 256, even.
        k_new, v_new: [B, Hk, D] unrotated, likewise.
        cos, sin: [B, D / 2] of `position`, contiguous.
        k, v: [A, Hk, C, D] slabs, contiguous. Mutated at the ring slot of `position`.
        expire: [A, Hk, P] int64, contiguous; C = P + W.
        lanes: [B] int64 rows of the slabs, each at most once (not checked).
        position: [B] int64; -1 is idle.
        window: W >= 1.
        scale: factor of the logits.

    Returns:
        Partial of [B, Hq, 1 or D] float32.

    Raises:
        ValueError: a shape, stride or dtype that the kernel does not take.
    """
    B, Hq, D = q.shape
    _, Hk, C, _ = k.shape
    P = expire.shape[2]
    _check(q, k_new, v_new, cos, sin, k, v, expire, lanes, position, window)
    maximum, denominator = q.new_empty((2, B, Hq, 1), dtype=torch.float32)
    numerator = q.new_empty((B, Hq, D), dtype=torch.float32)
    if B == 0:
        return Partial(maximum, numerator, denominator)
    with torch.cuda.device_of(q):
        _ring_decode_kernel[(Hk, B)](
            q_ptr=q,
            k_new_ptr=k_new,
            v_new_ptr=v_new,
            cos_ptr=cos,
            sin_ptr=sin,
            k_ptr=k,
            v_ptr=v,
            expire_ptr=expire,
            lanes_ptr=lanes,
            position_ptr=position,
            maximum_ptr=maximum,
            numerator_ptr=numerator,
            denominator_ptr=denominator,
            q_row=q.stride(0),
            q_head=q.stride(1),
            k_row=k_new.stride(0),
            k_head=k_new.stride(1),
            v_row=v_new.stride(0),
            v_head=v_new.stride(1),
            lane_slots=C,
            long_slots=P,
            window=window,
            scale=scale,
            **_launch(Hk, Hq // Hk, D, C, q.dtype),
        )
    return Partial(maximum, numerator, denominator)


def _launch(kv_heads: int, group: int, head_dim: int, slots: int, dtype: torch.dtype) -> dict[str, Any]:
    # Constants and options of the launch. Tiles of at most 64 slots and 16 KiB a slab, but of the 16 slots that tl.dot
    # needs; as many stages as fit a GPU with 99 KiB of shared memory. Fused multiply-adds would round a rotated float32
    # key unlike the reference.
    block_d = max(16, triton.next_power_of_2(head_dim))
    row = block_d * dtype.itemsize
    block_n = max(16, min(64, 16_384 // row, triton.next_power_of_2(slots)))
    return {
        "Hk": kv_heads,
        "G": group,
        "D": head_dim,
        "BLOCK_G": max(16, triton.next_power_of_2(group)),
        "BLOCK_D": block_d,
        "BLOCK_N": block_n,
        "num_warps": 4,
        "num_stages": 4 if block_n * row <= 8_192 else 3,
        "enable_fp_fusion": False,
    }


def _check(
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
) -> None:
    B, Hq, D = q.shape
    A, Hk = k.shape[:2]
    P = expire.shape[2]
    floats = {"q": q, "k_new": k_new, "v_new": v_new, "cos": cos, "sin": sin, "k": k, "v": v}
    ints = {"expire": expire, "lanes": lanes, "position": position}
    shapes = {
        "k_new": (B, Hk, D),
        "v_new": (B, Hk, D),
        "cos": (B, D // 2),
        "sin": (B, D // 2),
        "k": (A, Hk, P + window, D),
        "v": (A, Hk, P + window, D),
        "expire": (A, Hk, P),
        "lanes": (B,),
        "position": (B,),
    }
    for name, tensor in (floats | ints).items():
        wanted = q.dtype if name in floats else torch.int64
        _require(tensor.dtype == wanted, name, wanted, tensor.dtype)
        _require(tensor.device == q.device, name, q.device, tensor.device)
        _require(tuple(tensor.shape) == shapes.get(name, (B, Hq, D)), name, shapes.get(name), tuple(tensor.shape))
        strided = name in ("q", "k_new", "v_new")
        packed = tensor.stride(-1) == 1 if strided else tensor.is_contiguous()
        _require(packed, f"{name} strides", "the last dimension at 1" if strided else "contiguous", tensor.stride())
    _require(q.dtype in DTYPES, "q", f"one of {DTYPES}", q.dtype)
    _require(D % 2 == 0 and 2 <= D <= MAX_HEAD_DIM, "head size", f"even, <= {MAX_HEAD_DIM}", D)
    _require(Hq % Hk == 0, "q heads", f"a multiple of {Hk}", Hq)
    _require(window >= 1, "window", ">= 1", window)


def _require(condition: bool, name: str, expected: object, found: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, found {found}")
