"""The Triton kernel without a GPU: under the interpreter, through the compiler, and how callers come to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from streamattn import kernels
from streamattn.kernels import reference

ROOT = Path(__file__).parents[2]

COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from streamattn.kernels import decode

element = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
ints, sums = ("expire_ptr", "lanes_ptr", "position_ptr"), ("maximum_ptr", "numerator_ptr", "denominator_ptr")
kernel = decode._ring_decode_kernel
for dtype, head_dim in ((torch.bfloat16, 128), (torch.float32, 256)):
    options = decode._launch(8, 4, head_dim, 1040, dtype)
    constants = {name: int(options.pop(name)) for name in ("Hk", "G", "D", "BLOCK_G", "BLOCK_D", "BLOCK_N")}
    signature = {name: "constexpr" if name in constants else "i32" for name in kernel.arg_names}
    signature |= {name: element[dtype] for name in signature if name.endswith("_ptr")} | {"scale": "fp32"}
    signature |= dict.fromkeys(ints, "*i64") | dict.fromkeys(sums, "*fp32")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= 99 * 1024, compiled.metadata.shared
    assert "cp.async.cg.shared.global" in compiled.asm["ptx"], "slabs are not read 16 bytes at a time"
    assert "ld.local" not in compiled.asm["ptx"], "an array went to local memory"
print("compiled")
"""


def python(*arguments: str, **environment: str) -> str:
    """Return what a fresh interpreter prints; fail with its output if it fails."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernel_under_the_interpreter() -> None:
    cases = "tests/kernels/interpreted_decode.py"
    printed = python("-m", "pytest", "-q", "-p", "no:cacheprovider", cases, TRITON_INTERPRET="1")
    assert "passed" in printed
    assert "skipped" not in printed


def test_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    assert "compiled" in python("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path))


def test_triton_is_imported_for_cuda_alone() -> None:
    code = """
import sys, torch
import streamattn.context
from streamattn import kernels
loaded = lambda: "triton" in sys.modules
assert kernels.decode_form("cpu", torch.bfloat16) is kernels.reference.ring_decode and not loaded()
assert kernels.decode_form("cuda", torch.float64) is kernels.reference.ring_decode and not loaded()
form = kernels.decode_form("cuda", torch.bfloat16)
assert form.__module__ == "streamattn.kernels.decode" and loaded()
print("ok")
"""
    assert "ok" in python("-c", code)


def arguments() -> dict[str, object]:
    torch.manual_seed(0)
    return {
        "q": torch.randn(2, 4, 8),
        "k_new": torch.randn(2, 2, 8),
        "v_new": torch.randn(2, 2, 8),
        "cos": torch.rand(2, 4),
        "sin": torch.rand(2, 4),
        "k": torch.randn(3, 2, 6, 8),
        "v": torch.randn(3, 2, 6, 8),
        "expire": torch.zeros(3, 2, 1, dtype=torch.int64),
        "lanes": torch.tensor([2, 0]),
        "position": torch.tensor([7, 1]),
        "window": 5,
        "scale": 0.5,
    }


def test_cpu_tensors_take_the_reference() -> None:
    for found, wanted in zip(kernels.ring_decode(**arguments()), reference.ring_decode(**arguments()), strict=True):  # type: ignore[arg-type]
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window", 4),
        ("k", torch.zeros(3, 2, 7, 8)),
        ("v", torch.zeros(3, 2, 8, 6).transpose(2, 3)),
        ("q", torch.zeros(2, 4, 8, dtype=torch.float64)),
        ("q", torch.zeros(2, 3, 8)),
        ("cos", torch.zeros(2, 4, dtype=torch.float16)),
        ("lanes", torch.zeros(2, dtype=torch.int32)),
        ("position", torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(name: str, value: object) -> None:
    from streamattn.kernels import decode

    with pytest.raises(ValueError, match=r"expected .*, found"):
        decode.ring_decode(**(arguments() | {name: value}))  # type: ignore[arg-type]
