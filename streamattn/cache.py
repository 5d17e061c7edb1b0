"""StreamCache: the bounded state of every lane. `context.py` reads and writes it, step by step.

The invariant, for a lane that has taken `n` tokens: position `p` with `n - W <= p < n` lies in ring slot
`P + (p mod W)`; a key that was handed on lies in its part's long slot until the slot's expiry, or in the kernel state;
nothing else is ever read. So a lane is reset by `position = 0`: its ring slots are out of reach by arithmetic, and its
first token finds the long slots expired and the states neutral. No slab is zeroed, rolled or shifted.

Order within one token: hand off the key that leaves the window, append, attend. A chunk attends over the old state and
itself, then commits in token order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamattn.errors import ConfigError
from streamattn.kernels import reference as ops
from streamattn.kernels.reference import KernelState
from streamattn.pattern import Pattern, Routes


@dataclass(slots=True, eq=False)
class LayerState:
    """One layer's tensors; rows are lanes, then spare rows for marks."""

    k: Tensor  # [A, Hk, C, D] rotated
    v: Tensor  # [A, Hk, C, D]
    expire: Tensor  # [A, Hk, P] int64
    kernel: KernelState | None
    omega: Tensor | None  # [Hk, M, D] random projections, shared by all lanes

    def tensors(self) -> list[Tensor]:
        """Return the tensors that hold lane state."""
        return [self.k, self.v, self.expire, *(self.kernel or ())]


class StreamCache:
    """Keys, values and states of `lanes` streams in a constant number of bytes.

    Args:
        patterns: one a layer.
        lanes: streams held at once.
        kv_heads, head_dim: Hk, D.
        dtype: of K and V.
        marks: spare rows for `mark`.
        rope_theta: base of the rotary frequencies.
        device: where the tensors live.
    """

    def __init__(
        self,
        patterns: Sequence[Pattern],
        *,
        lanes: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        marks: int = 0,
        rope_theta: float = 10_000.0,
        device: torch.device | str = "cpu",
    ) -> None:
        if lanes < 1 or marks < 0:
            raise ConfigError(f"lanes, marks: expected >= 1 and >= 0, found {lanes} and {marks}")
        if head_dim % 2:
            raise ConfigError(f"head_dim: expected an even number, found {head_dim}")
        self.patterns = tuple(patterns)
        self.lanes, self.marks = lanes, marks
        self.kv_heads, self.head_dim, self.dtype = kv_heads, head_dim, dtype
        self.device = torch.device(device)
        self.frequencies = ops.rope_frequencies(head_dim, rope_theta).to(self.device)
        self.num_pins = max(pattern.num_pins for pattern in patterns)
        rows = lanes + marks
        self.position = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.pins = torch.full((rows, self.num_pins), -1, dtype=torch.int64, device=self.device)
        self.layers = [self._layer(pattern, index, rows) for index, pattern in enumerate(self.patterns)]

    def _layer(self, pattern: Pattern, index: int, rows: int) -> LayerState:
        slab = (rows, self.kv_heads, pattern.slots, self.head_dim)
        kernel = omega = None
        if pattern.kernel is not None:
            acc = ops.accumulator_dtype(self.dtype)
            sums = (rows, self.kv_heads, pattern.kernel.features)
            kernel = KernelState(
                torch.full(sums, -math.inf, dtype=acc, device=self.device),
                torch.zeros(*sums, self.head_dim, dtype=acc, device=self.device),
                torch.zeros(sums, dtype=acc, device=self.device),
            )
            omega = pattern.kernel.omega(index, self.kv_heads, self.head_dim).to(self.device, acc)
        return LayerState(
            torch.zeros(slab, dtype=self.dtype, device=self.device),
            torch.zeros(slab, dtype=self.dtype, device=self.device),
            torch.zeros((rows, self.kv_heads, pattern.long_slots), dtype=torch.int64, device=self.device),
            kernel,
            omega,
        )

    # --- memory ---

    @property
    def memory_bytes(self) -> int:
        """Bytes of all lanes, in closed form: `lanes` times every layer's `Pattern.memory_bytes`, position and pins."""
        return self.lanes * self._row_bytes

    @property
    def spare_bytes(self) -> int:
        """Bytes of the rows kept for marks."""
        return self.marks * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        layers = sum(p.memory_bytes(self.kv_heads, self.head_dim, self.dtype) for p in self.patterns)
        return layers + (1 + self.num_pins) * torch.int64.itemsize

    def allocated_bytes(self) -> int:
        """Return the bytes of the storages behind lanes and marks, counted on the tensors themselves."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        return [self.position, self.pins, *(t for layer in self.layers for t in layer.tensors())]

    # --- lanes ---

    def reset(self, lane: int) -> None:
        """Give the lane to a new stream: position 0, nothing pinned. What its slots hold is never read again."""
        self.position[lane] = 0
        self.pins[lane] = -1

    def copy_lane(self, source: int, target: int) -> None:
        """Copy everything a lane holds into another row. Exact for every part."""
        for tensor in self._tensors():
            tensor[target].copy_(tensor[source])

    def copy_lane_from(self, source: StreamCache, lane: int, rows: slice) -> None:
        """Copy everything a lane of another cache holds into each of these rows. Exact for every part.

        Raises:
            ConfigError: the caches are not of one shape, dtype and device.
        """
        shapes = [
            (c.patterns, c.kv_heads, c.head_dim, c.dtype, c.device, c.frequencies.tolist()) for c in (self, source)
        ]
        if shapes[0] != shapes[1]:
            raise ConfigError("copy_lane_from: expected caches of one model and device, found two")
        for target, tensor in zip(self._tensors(), source._tensors(), strict=True):
            target[rows] = tensor[lane]

    def mark(self, lane: int, mark: int) -> None:
        """Copy the lane into spare row `mark` (0 … marks - 1)."""
        self.copy_lane(lane, self._spare(mark))

    def rollback(self, lane: int, mark: int) -> None:
        """Copy spare row `mark` back into the lane; the mark stays."""
        self.copy_lane(self._spare(mark), lane)

    def _spare(self, mark: int) -> int:
        if not 0 <= mark < self.marks:
            raise ConfigError(f"mark: expected 0 to {self.marks - 1}, found {mark}")
        return self.lanes + mark

    # --- what is visible ---

    def resident(self, lane: int, position: int) -> bool:
        """Return whether the lane's last token sees the key at `position` exactly, in every layer.

        A key that only a Kernel state holds is not resident.
        """
        return bool(self.resident_many([lane], [position])[0])

    def resident_many(self, lanes: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Return `resident` of many pairs of a lane and a position at once: [N] bool.

        Args:
            lanes: [N], any lane any number of times.
            positions: [N]
        """
        rows, j = (torch.tensor(x, dtype=torch.int64, device=self.device) for x in (lanes, positions))
        t = self.position[rows] - 1
        seen = (j >= 0) & (j <= t)
        for pattern, layer in zip(self.patterns, self.layers, strict=True):
            in_window = t - j < pattern.window
            if pattern.long_slots == 0 or bool(in_window.all()):
                seen &= in_window
                continue
            slot, expire, _ = (x.squeeze(1) for x in self.route(pattern, j.unsqueeze(1), rows))
            written = layer.expire[rows, 0, slot.clamp(min=0)]
            seen &= in_window | ((slot >= 0) & (t < expire) & (t < written))
        return seen

    def pin(self, lane: int, position: int) -> None:
        """Keep the key at `position` visible after it has left the window, until `unpin`.

        Raises:
            ConfigError: no layer has pinned slots, all are taken, or the position is not in the window of every
                layer that has them.
        """
        if not self.num_pins:
            raise ConfigError("pin: expected a pattern with Global(pinned=…), found none")
        taken = self.pins[lane].tolist()
        if position in taken:
            return
        window = min(pattern.window for pattern in self.patterns if pattern.num_pins)
        seen = int(self.position[lane])
        if not max(0, seen - window) <= position < seen:
            raise ConfigError(
                f"pin: expected a position in the window, {max(0, seen - window)} to {seen - 1}, found {position}"
            )
        budget = min(pattern.num_pins for pattern in self.patterns if pattern.num_pins)
        if -1 not in taken[:budget]:
            raise ConfigError(f"pin: expected one of {budget} pinned slots to be free, found all taken; unpin one")
        self.pins[lane, taken.index(-1)] = position

    def unpin(self, lane: int, position: int) -> None:
        """Forget a pin. A key that has left the window is no longer visible; one in the window stays until it leaves.

        Raises:
            ConfigError: the position is not pinned.
        """
        taken = self.pins[lane].tolist()
        if position not in taken or position < 0:
            raise ConfigError(f"unpin: expected one of {[p for p in taken if p >= 0]}, found {position}")
        self.pins[lane, taken.index(position)] = -1
        now = int(self.position[lane])
        for pattern, layer in zip(self.patterns, self.layers, strict=True):
            if pattern.num_pins and position < now - pattern.window:
                slot = pattern.first_pinned_slot + taken.index(position)
                layer.expire[lane, :, slot] = now

    def route(self, pattern: Pattern, j: Tensor, lanes: Tensor) -> Routes:
        """Return `pattern.routes` of positions [B, N] of lanes [B] under the lanes' pins."""
        return pattern.routes(j, self.pins[lanes, : pattern.num_pins] if pattern.num_pins else None)
