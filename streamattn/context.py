"""How a model attends: one step over a StreamCache, or whole sequences in the parallel form.

A model sees `context.attend(layer, q, k, v)` with unrotated q and k, and nothing else of positions or memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from streamattn.cache import LayerState, StreamCache
from streamattn.kernels import reference as ops
from streamattn.kernels import ring_decode
from streamattn.kernels.reference import KernelState, Partial
from streamattn.pattern import Pattern, parallel_attention


class AttentionContext(Protocol):
    """What a model needs to attend."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [..., Hq, D] for q [..., Hq, D] and k, v [..., Hk, D], unrotated."""
        ...


class Rows(NamedTuple):
    """Which lanes a step serves: `lanes[i]` gets `lengths[i]` tokens. Tokens are packed lane after lane."""

    lanes: list[int]
    lengths: list[int]


class StreamContext:
    """One step of some lanes through all layers, and the only writer of a StreamCache.

    Rows of one token decode in place; longer ones attend as chunks. Tokens are packed `[N]`: all one-token rows first.
    Use once: build it, run the model, then `commit`.

    Args:
        cache: mutated by `attend`, layer by layer; positions move in `commit`.
        rows: lanes, each at most once, with their number of tokens; one-token rows first.
        scale: factor of the logits.
        phase: added to every rotary position; outputs do not depend on it.
    """

    def __init__(self, cache: StreamCache, rows: Rows, scale: float, phase: int = 0) -> None:
        self.cache, self.scale = cache, scale
        device = cache.device
        self.num_decode = sum(1 for length in rows.lengths if length == 1)
        assert all(length == 1 for length in rows.lengths[: self.num_decode]), "one-token rows come first"
        self.lanes = torch.tensor(rows.lanes, dtype=torch.int64, device=device)
        self.lengths = torch.tensor(rows.lengths, dtype=torch.int64, device=device)
        start = cache.position[self.lanes]
        self._refresh(start)
        n = self.num_decode
        rope = _Rope(cache, phase)
        self.decode = _DecodePlans(cache, rope, self.lanes[:n], start[:n]) if n else None
        self.chunk = None
        if len(rows.lanes) > n:
            self.chunk = _ChunkPlans(cache, rope, self.lanes[n:], start[n:], self.lengths[n:])

    def _refresh(self, start: Tensor) -> None:
        """Let lanes that begin at position 0 start from expired slots and neutral states."""
        fresh = self.lanes[start == 0]
        if len(fresh) == 0:
            return
        for layer in self.cache.layers:
            layer.expire[fresh] = 0
            if layer.kernel is not None:
                layer.kernel.log_max[fresh] = -math.inf

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attention of packed tokens, and write their keys and values: [N, Hq, D].

        Args:
            layer: index of the layer.
            q: [N, Hq, D], k, v: [N, Hk, D]; unrotated.
        """
        n = self.num_decode
        outputs = []
        if self.decode is not None:
            outputs.append(ops.finish(self.decode.attend(layer, q[:n], k[:n], v[:n], self.scale)))
        if self.chunk is not None:
            outputs.append(ops.finish(self.chunk.attend(layer, q[n:], k[n:], v[n:], self.scale)))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(q.dtype)

    def commit(self) -> None:
        """Move the positions of the step's lanes past its tokens."""
        self.cache.position[self.lanes] += self.lengths


class _Rope:
    """Cosine and sine tables of one step."""

    def __init__(self, cache: StreamCache, phase: int) -> None:
        self.frequencies, self.dtype, self.phase = cache.frequencies, cache.dtype, phase

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = ops.rope_table(positions + self.phase, self.frequencies, ops.accumulator_dtype(self.dtype))
        return cos.to(self.dtype), sin.to(self.dtype)


class _DecodePlan(NamedTuple):
    """What one step of one-token rows does in every layer of one pattern."""

    source: Tensor  # [B] slot of the key that leaves the window
    slot: Tensor | None  # [B] long slot that takes it; None: nobody's is taken
    expire: Tensor | None  # [B], with `slot`
    to_kernel: Tensor | None  # [B], for patterns with a Kernel part
    ring: Tensor  # [B] slot of the new key; -1 without a window
    window_seen: Tensor | None  # [B, 1, W]; None: every ring is full
    undo: tuple[Tensor, Tensor] | None  # cos, -sin of the position that leaves, where a Kernel part wants its key


class _DecodePlans:
    """One token of each lane: hand off, append, attend."""

    def __init__(self, cache: StreamCache, rope: _Rope, lanes: Tensor, position: Tensor) -> None:
        self.cache, self.rope, self.lanes, self.position = cache, rope, lanes, position
        self.cos, self.sin = rope.table(position)
        self.rows: Tensor | slice = lanes
        if len(lanes) == 1 or bool((lanes == torch.arange(len(lanes), device=lanes.device) + lanes[:1]).all()):
            first = int(lanes[0])
            self.rows = slice(first, first + len(lanes))  # neighbouring lanes: read in place, without a copy
        self.plans = {pattern: self._plan(pattern) for pattern in set(cache.patterns)}

    def _plan(self, pattern: Pattern) -> _DecodePlan:
        t, window = self.position, pattern.window
        slot = expire = to_kernel = None
        if int(t.min()) - window < pattern.routed_before:
            leaving = (t - window).unsqueeze(1)
            slot, expire, to_kernel = (x.squeeze(1) for x in self.cache.route(pattern, leaving, self.lanes))
            slot = slot if bool((slot >= 0).any()) else None
        ring = pattern.long_slots + torch.remainder(t, max(window, 1)) if window else torch.full_like(t, -1)
        filling = bool((t < window - 1).any())
        no_slots = self.lanes.new_empty((len(t), 1, 0))
        undo = None
        if pattern.kernel is not None and window:
            cos, sin = self.rope.table(t - window)
            undo = cos, -sin
        return _DecodePlan(
            ring,  # the key that leaves lies where the new one goes
            slot,
            expire,
            to_kernel,
            ring,
            ops.slot_visibility(t, no_slots, window) if filling else None,
            undo,
        )

    def attend(self, layer: int, q: Tensor, k_new: Tensor, v_new: Tensor, scale: float) -> Partial:
        pattern, state = self.cache.patterns[layer], self.cache.layers[layer]
        plan = self.plans[pattern]
        with torch.no_grad():
            kernel = self._update_kernel(pattern, state, plan, k_new, v_new, scale)
        if q.is_cuda and pattern.window and not q.requires_grad:  # the fused launch has no gradient
            partial = self._fused(pattern.window, state, plan, (q, k_new, v_new), scale)
        else:
            with torch.no_grad():
                self._write(pattern, state, plan, ops.rotate(k_new, self.cos, self.sin), v_new)
            visible = self._visible(pattern, state, plan)
            rotated = ops.rotate(q, self.cos, self.sin).unsqueeze(1)
            partial = ops.attend(rotated, state.k[self.rows], state.v[self.rows], visible, scale)
            partial = Partial(*(x.squeeze(1) for x in partial))
        if kernel is None:
            return partial
        assert state.omega is not None
        omega = state.omega.repeat_interleave(q.shape[1] // k_new.shape[1], 0)
        return ops.merge([partial, ops.kernel_read(kernel, ops.log_features(q, omega, scale))])

    def _fused(
        self, window: int, state: LayerState, plan: _DecodePlan, new: tuple[Tensor, Tensor, Tensor], scale: float
    ) -> Partial:
        if plan.slot is not None and plan.expire is not None:
            ops.hand_off(state.k, state.v, state.expire, self.lanes, plan.source, plan.slot, plan.expire)
        slabs = state.k, state.v, state.expire
        return ring_decode(*new, self.cos, self.sin, *slabs, self.lanes, self.position, window, scale)

    def _update_kernel(
        self, pattern: Pattern, state: LayerState, plan: _DecodePlan, k_new: Tensor, v_new: Tensor, scale: float
    ) -> KernelState | None:
        if pattern.kernel is None:
            return None
        assert state.kernel is not None
        assert state.omega is not None
        k, v = k_new, v_new
        if plan.undo is not None:
            k, v = state.k[self.lanes, :, plan.source], state.v[self.lanes, :, plan.source]
            k = ops.rotate(k, *plan.undo)
        log_key = ops.log_features(k, state.omega, scale)
        old = KernelState(*(x[self.lanes] for x in state.kernel))
        assert plan.to_kernel is not None
        new = ops.kernel_update(old, log_key, v, plan.to_kernel, math.log(pattern.kernel.decay))
        for target, value in zip(state.kernel, new, strict=True):
            target[self.lanes] = value
        return new

    def _write(self, pattern: Pattern, state: LayerState, plan: _DecodePlan, k_new: Tensor, v_new: Tensor) -> None:
        if pattern.window:
            if plan.slot is not None and plan.expire is not None:
                ops.hand_off(state.k, state.v, state.expire, self.lanes, plan.source, plan.slot, plan.expire)
            ops.append(state.k, state.v, self.lanes, plan.ring, k_new, v_new)
        elif plan.slot is not None and plan.expire is not None:  # without a window a key is handed on as it arrives
            ops.append(state.k, state.v, self.lanes, plan.slot, k_new, v_new)
            taken = plan.slot >= 0
            state.expire[self.lanes[taken], :, plan.slot[taken]] = plan.expire[taken, None]

    def _visible(self, pattern: Pattern, state: LayerState, plan: _DecodePlan) -> Tensor | None:
        if not pattern.long_slots:
            return None if plan.window_seen is None else plan.window_seen.unsqueeze(2)
        visible = self.position[:, None, None] < state.expire[self.rows]
        if pattern.window:
            ring = plan.window_seen
            if ring is None:
                if bool(visible.all()):
                    return None
                ring = visible.new_ones((len(self.position), 1, pattern.window))
            visible = torch.cat((visible, ring.expand(-1, visible.shape[1], -1)), dim=-1)
        return visible.unsqueeze(2)


class _Writes(NamedTuple):
    """Which keys are written where after a chunk, one entry a key."""

    lane: Tensor  # row of the call
    key: Tensor  # index into ring and chunk keys
    row: Tensor  # row of the slab
    slot: Tensor
    expire: Tensor


class _ChunkPlan(NamedTuple):
    """What one step of chunks does in every layer of one pattern. Old keys are `[long | ring | chunk]`."""

    seen: Tensor  # [B, 1, T, W + T] of ring and chunk keys
    long: _Writes | None  # keys that are in a long slot after the chunk and were not before
    ring: _Writes | None
    handed: Tensor | None  # [B, T] index into ring and chunk keys of the key that leaves the window at each step
    to_kernel: Tensor | None  # [B, T]; both for patterns with a Kernel part


class _ChunkPlans:
    """Chunks of one or several lanes, ragged: attend over the old state and the chunk, then commit."""

    def __init__(self, cache: StreamCache, rope: _Rope, lanes: Tensor, start: Tensor, lengths: Tensor) -> None:
        self.cache, self.rope, self.lanes, self.start, self.lengths = cache, rope, lanes, start, lengths
        self.size = int(lengths.max())
        steps = torch.arange(self.size, device=lanes.device)
        self.inside = steps < lengths[:, None]  # [B, T]
        self.full = bool(self.inside.all())
        self.t = start[:, None] + steps  # [B, T]
        self.cos, self.sin = rope.table(self.t)  # [B, T, D / 2]
        self.plans = {pattern: self._plan(pattern) for pattern in set(cache.patterns)}

    def _plan(self, pattern: Pattern) -> _ChunkPlan:
        window, start = pattern.window, self.start[:, None]
        ring_slots = torch.arange(window, device=start.device)
        last = start - 1
        held = last - torch.remainder(last - ring_slots, max(window, 1))  # [B, W]; negative: nothing yet
        j = torch.cat((held, torch.where(self.inside, self.t, -1)), dim=1)  # [B, W + T]
        end = start + self.lengths[:, None]  # the lane's next position
        t = self.t[..., None]
        seen = (j >= 0).unsqueeze(1) & (j.unsqueeze(1) <= t)
        if int(start.min()) - window >= pattern.routed_before:
            seen = seen & (t < (j + window).unsqueeze(1))
            return _ChunkPlan(self._inside(seen), None, self._to_ring(pattern, end), None, None)
        routes = self.cache.route(pattern, j, self.lanes)
        seen = seen & (t < routes.expire.unsqueeze(1))
        # A key stays in a long slot if it has left the window by the last query and outlives it. Keys that share a
        # slot expire when the next one takes it, so at most one of them does both.
        stays = (routes.slot >= 0) & (j >= 0) & (j <= end - 1 - window) & (routes.expire > end - 1)
        handed = to_kernel = None
        if pattern.kernel is not None:
            leaving = self.t - window
            from_ring = torch.remainder(leaving, max(window, 1))
            handed = torch.where(leaving < start, from_ring, window + leaving - start).clamp(min=0)
            to_kernel = torch.gather(routes.to_kernel, 1, handed) & (leaving >= 0) & self.inside
        long = self._writes(stays, routes.slot, routes.expire)
        return _ChunkPlan(self._inside(seen), long, self._to_ring(pattern, end), handed, to_kernel)

    def _inside(self, seen: Tensor) -> Tensor:
        return (seen if self.full else seen & self.inside[..., None]).unsqueeze(1)

    def _to_ring(self, pattern: Pattern, end: Tensor) -> _Writes | None:
        if not pattern.window:
            return None
        slot = pattern.long_slots + torch.remainder(self.t, pattern.window)
        writes = self._writes(self.inside & (self.t >= end - pattern.window), slot, slot)
        assert writes is not None, "a chunk has tokens"
        return writes._replace(key=writes.key + pattern.window)

    def _writes(self, wanted: Tensor, slot: Tensor, expire: Tensor) -> _Writes | None:
        lane, key = wanted.nonzero(as_tuple=True)
        if len(lane) == 0:
            return None
        return _Writes(lane, key, self.lanes[lane], slot[lane, key], expire[lane, key])

    def attend(self, layer: int, q: Tensor, k_new: Tensor, v_new: Tensor, scale: float) -> Partial:
        pattern, state = self.cache.patterns[layer], self.cache.layers[layer]
        plan = self.plans[pattern]
        q, k_new, v_new = self._pad(q), self._pad(k_new), self._pad(v_new)
        k_new = ops.rotate(k_new, self.cos, self.sin)
        P = pattern.long_slots
        # Copies, so that the commit below disturbs neither this attention nor a later backward pass through it.
        k = torch.cat((state.k[self.lanes], k_new.transpose(1, 2).to(state.k.dtype)), dim=2)
        v = torch.cat((state.v[self.lanes], v_new.transpose(1, 2).to(state.v.dtype)), dim=2)
        visible = plan.seen.expand(-1, k.shape[1], -1, -1)
        if P:
            long = self.t[:, None, :, None] < state.expire[self.lanes].unsqueeze(2)
            visible = torch.cat((long if self.full else long & self.inside[:, None, :, None], visible), dim=-1)
        partials = [ops.attend(ops.rotate(q, self.cos, self.sin), k, v, visible, scale)]
        if pattern.kernel is not None:
            partials.append(self._scan_kernel(pattern, state, plan, q, k[:, :, P:], v[:, :, P:], scale))
        with torch.no_grad():
            self._commit(state, plan, k[:, :, P:].detach(), v[:, :, P:].detach())
        return Partial(*(self._unpad(x) for x in ops.merge(partials)))

    def _scan_kernel(
        self, pattern: Pattern, state: LayerState, plan: _ChunkPlan, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Partial:
        assert pattern.kernel is not None
        assert state.kernel is not None
        assert state.omega is not None
        assert plan.handed is not None
        assert plan.to_kernel is not None
        log_decay = math.log(pattern.kernel.decay)
        log_query = ops.log_features(q, state.omega.repeat_interleave(q.shape[2] // k.shape[1], 0), scale)
        index = plan.handed[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        keys, values = k.gather(2, index).transpose(1, 2), v.gather(2, index).transpose(1, 2)  # [B, T, Hk, D]
        cos, sin = self.rope.table(self.t - pattern.window)
        log_key = ops.log_features(ops.rotate(keys, cos, -sin), state.omega, scale)
        rows = KernelState(*(x[self.lanes] for x in state.kernel))
        reads = []
        for step in range(self.size):
            moved = ops.kernel_update(rows, log_key[:, step], values[:, step], plan.to_kernel[:, step], log_decay)
            inside = self.inside[:, step, None, None]
            rows = KernelState(
                torch.where(inside, moved.log_max, rows.log_max),
                torch.where(inside.unsqueeze(-1), moved.values, rows.values),
                torch.where(inside, moved.weights, rows.weights),
            )
            reads.append(ops.kernel_read(rows, log_query[:, step]))
        with torch.no_grad():
            for target, value in zip(state.kernel, rows, strict=True):
                target[self.lanes] = value.detach()
        return Partial(*(torch.stack(parts, dim=1) for parts in zip(*reads, strict=True)))

    @staticmethod
    def _commit(state: LayerState, plan: _ChunkPlan, k: Tensor, v: Tensor) -> None:
        if plan.long is not None:
            state.expire[plan.long.row, :, plan.long.slot] = plan.long.expire.unsqueeze(1)
        for writes in (plan.long, plan.ring):
            if writes is not None:
                state.k[writes.row, :, writes.slot] = k[writes.lane, :, writes.key]
                state.v[writes.row, :, writes.slot] = v[writes.lane, :, writes.key]

    def _pad(self, x: Tensor) -> Tensor:
        if self.full:
            return x.view(len(self.lanes), self.size, *x.shape[1:])
        padded = x.new_zeros((len(self.lanes), self.size, *x.shape[1:]))
        padded[self.inside] = x
        return padded

    def _unpad(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if self.full else x[self.inside]


class ParallelContext:
    """Whole sequences of `tokens` from position 0 without a cache: the parallel form, [B, N] tokens."""

    def __init__(
        self,
        patterns: Sequence[Pattern],
        tokens: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        rope_theta: float,
        scale: float,
        device: torch.device | str = "cpu",
        block: int = 128,
    ) -> None:
        self.patterns, self.scale, self.block = tuple(patterns), scale, block
        positions = torch.arange(tokens, device=device)
        frequencies = ops.rope_frequencies(head_dim, rope_theta).to(device)
        cos, sin = ops.rope_table(positions, frequencies, ops.accumulator_dtype(dtype))
        self.cos, self.sin = cos.to(dtype), sin.to(dtype)
        self.omegas = [
            p.kernel.omega(layer, kv_heads, head_dim).to(device) if p.kernel else None
            for layer, p in enumerate(patterns)
        ]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attention of [B, N, Hq, D] queries; q, k, v unrotated."""
        rotated = ops.rotate(q, self.cos, self.sin), ops.rotate(k, self.cos, self.sin)
        omega = self.omegas[layer]
        return parallel_attention(self.patterns[layer], *rotated, v, self.scale, (q, k), omega, self.block)
