"""The specification against independent computations: PyTorch's attention, numpy, exact fractions, transformers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from streamattn.kernels import reference as ops
from streamattn.kernels.reference import KernelState, Partial


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 31 * len(shape)), dtype=torch.float64)


def exact(found: Tensor, wanted: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


# --- attend, merge, finish ---


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_equals_torch(q_heads: int, kv_heads: int, masked: bool) -> None:
    B, T, N, D, scale = 2, 3, 11, 6, 0.37
    q, k, v = normal(B, T, q_heads, D), normal(B, kv_heads, N, D, seed=1), normal(B, kv_heads, N, D, seed=2)
    visible = (normal(B, kv_heads, T, N, seed=3) > 0) if masked else None
    if visible is not None:
        visible[..., 0] = True
    group = q_heads // kv_heads
    wanted = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.repeat_interleave(group, 1),
        v.repeat_interleave(group, 1),
        attn_mask=None if visible is None else visible.repeat_interleave(group, 1),
        scale=scale,
    )
    exact(ops.finish(ops.attend(q, k, v, visible, scale)), wanted.transpose(1, 2))


def test_what_is_not_visible_may_be_nan_and_nothing_visible_gives_zeros() -> None:
    q, k, v = normal(1, 2, 2, 4), normal(1, 1, 5, 4, seed=1), normal(1, 1, 5, 4, seed=2)
    visible = torch.zeros(1, 1, 2, 5, dtype=torch.bool)
    visible[..., 0, :2] = True  # the second query sees nothing
    k[:, :, 2:], v[:, :, 2:] = math.nan, math.inf
    result = ops.finish(ops.attend(q, k, v, visible, 1.0))
    exact(result[:, :1], ops.finish(ops.attend(q[:, :1], k[:, :, :2], v[:, :, :2], None, 1.0)))
    assert (result[:, 1] == 0).all()
    assert (ops.finish(ops.attend(q, k[:, :, :0], v[:, :, :0], None, 1.0)) == 0).all()


def test_merge_joins_disjoint_keys_in_any_grouping() -> None:
    q, k, v = 5 * normal(2, 3, 4, 8), 5 * normal(2, 2, 12, 8, seed=1), normal(2, 2, 12, 8, seed=2)
    whole = ops.attend(q, k, v, None, 1.0)
    a, b, c, empty = (
        ops.attend(q, k[:, :, part], v[:, :, part], None, 1.0)
        for part in (slice(0, 5), slice(5, 6), slice(6, 12), slice(0, 0))
    )
    groupings = (
        ops.merge([a, b, c]),
        ops.merge([ops.merge([a, b]), c]),
        ops.merge([a, ops.merge([empty, ops.merge([b, c])])]),
        ops.merge([empty, c, a, empty, b]),
    )
    for joined in groupings:
        exact(ops.finish(joined), ops.finish(whole))
        exact(joined.maximum, whole.maximum)
        exact(joined.denominator, whole.denominator)
    nothing = ops.merge([empty, empty])
    assert (nothing.maximum == -math.inf).all()
    assert (ops.finish(nothing) == 0).all()


# --- rotary positions ---


def test_rope_table_equals_numpy_at_small_positions() -> None:
    head_dim, theta = 16, 10_000.0
    positions = np.arange(0, 2000, 37)
    angles = positions[:, None] * theta ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    cos, sin = ops.rope_table(torch.from_numpy(positions), ops.rope_frequencies(head_dim, theta), torch.float64)
    exact(cos, torch.from_numpy(np.cos(angles)))
    exact(sin, torch.from_numpy(np.sin(angles)))


@pytest.mark.parametrize("far", [2**40, 2**40 + 12_345, 2**62])
def test_phases_add_exactly_however_far(far: int) -> None:
    frequencies = ops.rope_frequencies(32, 10_000.0)
    near = torch.tensor([0, 1, 1023, 2**31 + 7])

    def turn(positions: Tensor) -> Tensor:
        return torch.complex(*ops.rope_table(positions, frequencies, torch.float64))

    exact(turn(near + far), turn(near) * turn(torch.tensor([far])), atol=5e-15)
    # The first frequency is 1 / (2 pi) turns, rounded to 2**-64 of a turn: the phase in exact arithmetic.
    step = Fraction(int(frequencies[0]) % 2**64, 2**64)
    angle = float(far * step % 1) * 2 * math.pi
    wanted = torch.tensor(complex(math.cos(angle), math.sin(angle)), dtype=torch.complex128)
    exact(turn(torch.tensor(far))[0], wanted, atol=5e-15)
    assert abs(float(step) - 1 / (2 * math.pi)) < 2**-53


def test_scores_depend_on_distance_alone() -> None:
    q, k = normal(1, 32), normal(1, 32, seed=1)
    frequencies = ops.rope_frequencies(32, 10_000.0)

    def score(q_position: int, k_position: int) -> Tensor:
        tables = [ops.rope_table(torch.tensor(p), frequencies, torch.float64) for p in (q_position, k_position)]
        return (ops.rotate(q, *tables[0]) * ops.rotate(k, *tables[1])).sum()

    for far in (10**6, 10**9, 2**40):
        exact(score(far + 77, far), score(77, 0))


def test_rotation_equals_transformers() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    positions = torch.arange(100)
    q, k = normal(1, 4, 100, 16).float(), normal(1, 2, 100, 16, seed=1).float()
    theirs = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(q, positions[None]))
    cos, sin = ops.rope_table(positions, ops.rope_frequencies(16, 10_000.0), torch.float32)
    for x, wanted in zip((q, k), theirs, strict=True):
        found = ops.rotate(x.transpose(1, 2), cos, sin).transpose(1, 2)
        torch.testing.assert_close(found, wanted, rtol=0, atol=3e-5)  # their angles are float32


# --- one token a lane ---


def test_ring_decode_is_attention_over_window_and_living_long_slots() -> None:
    window, tokens, D, scale, until = 4, 15, 6, 0.5, 9
    q, k, v = (normal(tokens, heads, D, seed=heads) for heads in (4, 2, 3))
    v = v[:, :2]
    cos, sin = ops.rope_table(torch.arange(tokens), ops.rope_frequencies(D, 100.0), torch.float64)
    k_slab, v_slab = (torch.full((3, 2, 1 + window, D), math.nan, dtype=torch.float64) for _ in "kv")
    expire = torch.zeros((3, 2, 1), dtype=torch.int64)
    lane = torch.tensor([1])
    rotated = ops.rotate(k, cos, sin)
    for t in range(tokens):
        if t == window:  # token 0 leaves the window and is kept until `until`
            source = torch.tensor([1])
            ops.hand_off(k_slab, v_slab, expire, lane, source, torch.tensor([0]), torch.tensor([until]))
        new = q[t : t + 1], k[t : t + 1], v[t : t + 1], cos[t : t + 1], sin[t : t + 1]
        partial = ops.ring_decode(*new, k_slab, v_slab, expire, lane, torch.tensor([t]), window, scale)
        seen = [j for j in range(t + 1) if t - j < window or (j == 0 and t < until)]
        wanted = scaled_dot_product_attention(
            ops.rotate(q[t : t + 1], cos[t : t + 1], sin[t : t + 1]).transpose(0, 1),
            rotated[seen].transpose(0, 1).repeat_interleave(2, 0),
            v[seen].transpose(0, 1).repeat_interleave(2, 0),
            scale=scale,
        )
        exact(ops.finish(partial), wanted.transpose(0, 1))
    assert k_slab[[0, 2]].isnan().all(), "another lane was written"


def test_idle_lanes_and_unused_hand_offs_write_nothing() -> None:
    k, v = normal(2, 1, 3, 4), normal(2, 1, 3, 4, seed=1)
    before = k.clone(), v.clone()
    expire = torch.tensor([[[5]], [[6]]])
    lanes, none = torch.tensor([0, 1]), torch.tensor([-1, -1])
    ops.hand_off(k, v, expire, lanes, none, none, none)
    new = normal(2, 2, 4), normal(2, 1, 4), normal(2, 1, 4), normal(2, 2), normal(2, 2)
    partial = ops.ring_decode(*new, k, v, expire, lanes, none, 2, 1.0)
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])
    assert expire.flatten().tolist() == [5, 6]
    assert (partial.maximum == -math.inf).all()
    assert (ops.finish(partial) == 0).all()


# --- kernel state ---


@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_kernel_state_equals_direct_sums(decay: float) -> None:
    B, Hk, group, M, D, steps, scale = 3, 2, 2, 5, 4, 9, 0.6
    omega = normal(Hk, M, D)
    k, v = 3 * normal(steps, B, Hk, D), normal(steps, B, Hk, D, seed=1)
    q = 3 * normal(steps, B, Hk * group, D, seed=2)
    taken = normal(steps, B, seed=3) > -0.3
    taken[0] = torch.tensor([True, False, False])
    k[~taken], v[~taken] = math.nan, math.nan  # what is not handed on may hold anything
    log_key = ops.log_features(k, omega, scale)
    log_query = ops.log_features(q, omega.repeat_interleave(group, 0), scale)
    state = KernelState(
        torch.full((B, Hk, M), -math.inf, dtype=torch.float64),
        *(torch.full(s, math.nan).double() for s in ((B, Hk, M, D), (B, Hk, M))),
    )
    for t in range(steps):
        state = ops.kernel_update(state, log_key[t], v[t], taken[t], math.log(decay))
        read: Partial = ops.kernel_read(state, log_query[t])
        for b in range(B):
            for h in range(Hk * group):
                weights = torch.stack(
                    [
                        (log_query[t, b, h] + log_key[j, b, h // group]).exp().sum() * decay ** (t - j)
                        for j in range(t + 1)
                        if taken[j, b]
                    ]
                    or [torch.zeros(()).double()]
                )
                values = [v[j, b, h // group] for j in range(t + 1) if taken[j, b]] or [torch.zeros(D).double()]
                total = weights.sum()
                wanted = (weights[:, None] * torch.stack(values)).sum(0) / (total if total > 0 else 1)
                exact(ops.finish(read)[b, h], wanted)
                found_total = read.denominator[b, h, 0] * read.maximum[b, h, 0].exp()
                torch.testing.assert_close(found_total, total, rtol=1e-12, atol=0)
