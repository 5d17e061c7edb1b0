"""Attention operations of the engine: the specification in plain PyTorch, and Triton kernels where a GPU is active.

Operations of this module take either; `reference` has the specification of all. Triton is imported when the first
CUDA tensor arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from streamattn.kernels import reference
from streamattn.kernels.reference import Partial

__version__ = "0.1.0"
__all__ = ["decode_form", "ring_decode"]


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
    """Rotate, append and attend: one token of each lane. Arguments and result as in `reference.ring_decode`."""
    form = decode_form(q.device.type, q.dtype)
    return form(q, k_new, v_new, cos, sin, k, v, expire, lanes, position, window, scale)


@cache
def decode_form(device: str, dtype: torch.dtype) -> Callable[..., Partial]:
    """Return which form of `ring_decode` serves tensors on a kind of device ("cpu", "cuda", …).

    The Triton kernel on CUDA; the reference elsewhere, for float64, and where triton is not installed.
    """
    if device != "cuda" or dtype == torch.float64 or find_spec("triton") is None:
        return reference.ring_decode
    from streamattn.kernels import decode  # not before: Triton is heavy, and needed on CUDA alone

    return decode.ring_decode
