"""Cases of the Triton `ring_decode` on CPU tensors. `test_decode.py` runs this file in a process of its own, with
TRITON_INTERPRET=1 from the start: triton decides when it is imported.

The interpreter computes float32 and float16 as a GPU does. Its bfloat16 is cut off instead of rounded and its products
of bfloat16 are wrong; `benchmarks/gpu_check.py` checks bfloat16 on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from streamattn.kernels import reference
from streamattn.kernels.decode import ring_decode
from streamattn.kernels.reference import NEVER, Partial

KV_HEADS = 2
SLACK = {torch.float32: 1e-6, torch.float16: 1e-3}  # of float32 sums, and of one rounding of the weights to float16


@pytest.fixture(autouse=True)
def _scalar_loop_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 holds scalars in arrays of one element, of which numpy 2.4 no longer makes an index."""
    patch = interpreter._patch_lang_tensor  # type: ignore[attr-defined]

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def make_case(
    dtype: torch.dtype, group: int, head_dim: int, long_slots: int, window: int, position: list[int]
) -> dict[str, Any]:
    """Return arguments of ring_decode; every slot that may not be read holds NaN."""
    torch.manual_seed(group * 10_007 + head_dim * 101 + window)
    lanes, rows, slots = len(position), len(position) + 2, long_slots + window
    t = torch.tensor(position)
    lane = torch.randperm(rows)[:lanes]
    cos, sin = reference.rope_table(t, reference.rope_frequencies(head_dim, 10_000.0), torch.float64)
    ends = torch.stack((torch.zeros_like(t), t, t + 1, t + 7, torch.full_like(t, NEVER)))
    expire = torch.full((rows, KV_HEADS, long_slots), NEVER)
    expire[lane] = ends[torch.randint(0, len(ends), (lanes, KV_HEADS, long_slots)), torch.arange(lanes)[:, None, None]]
    readable = torch.zeros(rows, KV_HEADS, slots, dtype=torch.bool)
    readable[lane] = reference.slot_visibility(t, expire[lane], window)
    readable[lane, :, long_slots + torch.remainder(t, window)] = False  # the key that the new one replaces
    k, v = (torch.randn(rows, KV_HEADS, slots, head_dim).masked_fill(~readable[..., None], math.nan) for _ in "kv")
    projection = torch.randn(lanes, (group + 2) * KV_HEADS, head_dim).to(dtype)  # a model's q, k, v are views of one
    q, k_new, v_new = projection.split((group * KV_HEADS, KV_HEADS, KV_HEADS), dim=1)
    return {
        "q": q,
        "k_new": k_new,
        "v_new": v_new,
        "cos": cos.to(dtype),
        "sin": sin.to(dtype),
        "k": k.to(dtype),
        "v": v.to(dtype),
        "expire": expire,
        "lanes": lane,
        "position": t,
        "window": window,
        "scale": 0.7 * head_dim**-0.5,
    }


def run(op: Any, case: dict[str, Any], dtype: torch.dtype) -> tuple[Partial, Tensor, Tensor]:
    own = {n: x.to(dtype, copy=True) if torch.is_tensor(x) and x.is_floating_point() else x for n, x in case.items()}
    own |= {name: case[name].to(dtype) for name in ("q", "k_new", "v_new")}  # as views, where the dtype stays
    return op(**own), own["k"], own["v"]


def log_sum(partial: Partial) -> Tensor:
    return partial.maximum + partial.denominator.log()


def distance(found: Tensor, wanted: Tensor) -> float:
    empty = (found == wanted) & wanted.isinf()
    return float(torch.where(empty, 0.0, found.double() - wanted.double()).abs().nan_to_num(nan=math.inf).max())


def check(case: dict[str, Any]) -> None:
    dtype = case["q"].dtype
    truth, *_ = run(reference.ring_decode, case, torch.float64)
    plain, *plain_slabs = run(reference.ring_decode, case, dtype)
    found, *slabs = run(ring_decode, case, dtype)
    for name, result in (("attention", reference.finish), ("log of the sum", log_sum)):
        wanted = result(truth)
        allowed = 2 * distance(result(plain), wanted) + SLACK[dtype]
        assert distance(result(found), wanted) <= allowed, name
    torch.testing.assert_close(found.maximum, plain.maximum, rtol=2e-3, atol=2e-3)
    for slab, plain_slab, name in zip(slabs, plain_slabs, "kv", strict=True):
        assert torch.equal(bits(slab), bits(plain_slab)), f"{name}: what is appended, or where"
        before = case[name].clone()
        used = case["position"] >= 0
        slot = case["expire"].shape[2] + torch.remainder(case["position"], case["window"])
        before[case["lanes"][used], :, slot[used]] = slab[case["lanes"][used], :, slot[used]]
        assert torch.equal(bits(slab), bits(before)), f"{name}: a slot or lane that is not the call's has changed"
    idle = case["position"] < 0
    assert (found.maximum[idle] == -math.inf).all()
    assert (found.numerator[idle] == 0).all()
    assert (found.denominator[idle] == 0).all()
    assert all(x.dtype == torch.float32 for x in found)


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize(
    ("group", "head_dim", "long_slots", "window"),
    [(1, 8, 0, 1), (2, 10, 1, 3), (4, 16, 17, 20), (1, 64, 0, 33), (2, 6, 5, 16), (4, 32, 3, 7), (4, 256, 2, 18)],
)
def test_equals_the_reference_at_wrap_points(
    dtype: torch.dtype, group: int, head_dim: int, long_slots: int, window: int
) -> None:
    slots = long_slots + window
    points = [0, window - 1, -1, window, slots - 1, slots, 2 * slots + 1, 10**9]
    check(make_case(dtype, group, head_dim, long_slots, window, points))


@pytest.mark.parametrize("group", [1, 2, 4])
def test_one_lane_far_into_a_stream(group: int) -> None:
    check(make_case(torch.float32, group, 16, 4, 9, [2**40 + 3]))


def test_all_lanes_idle_leaves_everything_as_it_was() -> None:
    check(make_case(torch.float32, 2, 16, 2, 5, [-1, -1]))


def test_a_stream_from_its_start_equals_attention_over_its_window() -> None:
    window, tokens, head_dim, scale = 5, 13, 8, 0.4
    torch.manual_seed(1)
    q, k, v = (torch.randn(tokens, KV_HEADS, head_dim) for _ in "qkv")
    cos, sin = reference.rope_table(torch.arange(tokens), reference.rope_frequencies(head_dim, 1e4), torch.float32)
    k_slab, v_slab = (torch.full((1, KV_HEADS, window, head_dim), math.nan) for _ in "kv")
    nothing, lane = torch.zeros((1, KV_HEADS, 0), dtype=torch.int64), torch.tensor([0])
    outputs = []
    for t in range(tokens):
        new = q[t : t + 1], k[t : t + 1], v[t : t + 1]
        table = cos[t : t + 1], sin[t : t + 1]
        partial = ring_decode(*new, *table, k_slab, v_slab, nothing, lane, torch.tensor([t]), window, scale)
        outputs.append(reference.finish(partial))
    rotated_q, rotated_k = (reference.rotate(x, cos, sin).transpose(0, 1) for x in (q, k))
    age = torch.arange(tokens)[:, None] - torch.arange(tokens)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        rotated_q, rotated_k, v.transpose(0, 1), attn_mask=(age >= 0) & (age < window), scale=scale
    )
    torch.testing.assert_close(torch.cat(outputs), wanted.transpose(0, 1), rtol=0, atol=1e-5)
