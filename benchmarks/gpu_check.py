"""Check the fused decode and a streaming model on a CUDA device, then time the decode: correctness first.

    python benchmarks/gpu_check.py [--out FILE]

1. `ring_decode` at full size against the reference in float64, with NaN in everything that must not be read. Judged by
   two distances: |kernel - float64| <= 2 * |PyTorch in the same dtype - float64| + 1e-6, over all outputs. What it
   appends must equal the reference to the bit, and a second run must return the same bits.
2. A small model streamed on the device through the fused decode, against the same stream on the CPU in float64; the
   same rule, with the CPU in the same dtype as the second distance.
3. Times in one CUDA graph over distinct slabs that together exceed the L2 many times, so every read is cold. Beside
   it, on the same slabs in the same run: PyTorch's scaled_dot_product_attention with the queries of a key head as its
   rows, alone, and with rotation and append as separate operations, which is what the fused decode does. The ring is
   full and every slot is visible, so no baseline needs a mask.

Without a CUDA device nothing is checked, and that is said.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from streamattn import kernels
from streamattn.context import Rows, StreamContext
from streamattn.kernels import reference
from streamattn.model import Head, Inputs, ModelConfig, StreamTransformer
from streamattn.pattern import Global, Kernel, Pattern, Strided, Window

KV_HEADS, GROUP, WINDOW, LONG_SLOTS = 8, 4, 1024, 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 128)
LANES = (1, 8, 64)
SLACK = 1e-6
COLD_BYTES = 1 << 30  # read between two uses of a slab; the largest L2 today is a tenth of it
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def decode_case(
    device: str, dtype: torch.dtype, head_dim: int, lanes: int, window: int = WINDOW, long_slots: int = LONG_SLOTS
) -> dict[str, Any]:
    """Return arguments of `ring_decode` at assorted positions, NaN wherever nothing may be read."""
    generator = torch.Generator(device).manual_seed(head_dim * 1000 + lanes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    rows = lanes + 2
    some = torch.tensor([10**9, 2 * window + 1, 0, -1, window - 1, window, 5, window + long_slots], device=device)
    position = some.repeat(lanes // len(some) + 1)[:lanes].contiguous()
    lane = torch.randperm(rows, generator=generator, device=device)[:lanes]
    frequencies = reference.rope_frequencies(head_dim, 10_000.0).to(device)
    cos, sin = reference.rope_table(position, frequencies, torch.float32)
    choice = torch.randint(0, 4, (lanes, KV_HEADS, long_slots), generator=generator, device=device)
    t = position[:, None, None]
    expire = torch.zeros((rows, KV_HEADS, long_slots), dtype=torch.int64, device=device)
    ends = (torch.zeros_like(choice), t.expand_as(choice), t + 1, torch.full_like(choice, reference.NEVER))
    expire[lane] = torch.stack([x.expand_as(choice) for x in ends]).gather(0, choice[None])[0]
    readable = torch.zeros((rows, KV_HEADS, long_slots + window), dtype=torch.bool, device=device)
    readable[lane] = reference.slot_visibility(position, expire[lane], window)
    readable[lane, :, long_slots + torch.remainder(position, window)] = False  # the key that the new one replaces
    k, v = (normal(rows, KV_HEADS, long_slots + window, head_dim) for _ in "kv")
    fused = normal(lanes, (GROUP + 2) * KV_HEADS, head_dim)  # as a model makes them: views of one projection
    q, k_new, v_new = fused.split((GROUP * KV_HEADS, KV_HEADS, KV_HEADS), dim=1)
    return {
        "q": q,
        "k_new": k_new,
        "v_new": v_new,
        "cos": cos.to(dtype),
        "sin": sin.to(dtype),
        "k": k.masked_fill(~readable.unsqueeze(-1), torch.nan),
        "v": v.masked_fill(~readable.unsqueeze(-1), torch.nan),
        "expire": expire,
        "lanes": lane,
        "position": position,
        "window": window,
        "scale": head_dim**-0.5,
    }


def run(op: Callable[..., reference.Partial], case: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the attention and the bits of both slabs after `op` on copies of the case in `dtype`."""
    own = {name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in case.items()} | {
        name: case[name].to(dtype, copy=True) for name in "kv"
    }
    partial = op(**own)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return reference.finish(partial), own["k"].view(bits), own["v"].view(bits)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Return the largest absolute difference; infinity where either is not finite."""
    return float((found.double() - wanted.double()).abs().nan_to_num(nan=torch.inf).max())


def check_decode(case: dict[str, Any], op: Callable[..., reference.Partial]) -> dict[str, Any]:
    """Return the distances of one case and whether it passes."""
    dtype = case["q"].dtype
    truth, *_ = run(reference.ring_decode, case, torch.float64)
    plain, *slabs = run(reference.ring_decode, case, dtype)
    found, *found_slabs = run(op, case, dtype)
    again, *_ = run(op, case, dtype)
    outcome = {
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": case["q"].shape[2],
        "lanes": len(case["lanes"]),
        "largest_output": float(truth.abs().max()),
        "kernel_distance": distance(found, truth),
        "torch_distance": distance(plain, truth),
        "slabs_equal": all(map(torch.equal, slabs, found_slabs)),
        "repeatable": torch.equal(found, again),
    }
    close = outcome["kernel_distance"] <= 2 * outcome["torch_distance"] + SLACK
    return outcome | {"ok": close and outcome["slabs_equal"] and outcome["repeatable"]}


def small_model() -> StreamTransformer:
    """Return a model of two layers that has every part between them."""
    patterns = (
        Pattern(Window(32), Global(first=4), Strided(8, 2, width=2)),
        Pattern(Window(24), Global(first=2), Kernel(32, decay=0.98)),
    )
    heads = (Head("next", "logits", 96),)
    config = ModelConfig(
        patterns, width=256, q_heads=8, kv_heads=2, head_dim=64, ffn=512, heads=heads, vocab=96, features=3
    )
    torch.manual_seed(11)
    return StreamTransformer(config).eval()


@torch.inference_mode()
def stream(device: str, dtype: torch.dtype, tokens: int = 160) -> Tensor:
    """Return the logits [3, tokens, 96] of three streams: chunks first, of different sizes, then token by token."""
    model = small_model().to(device, dtype)
    cache = model.new_cache(3)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 96, (3, tokens), generator=generator)
    features = torch.randn(3, tokens, 3, generator=generator)
    logits = torch.zeros(3, tokens, 96, dtype=torch.float64)
    at = [0, 0, 0]
    for step in range(tokens):
        sizes = [min((1, 1, 40)[lane] if step == 0 else 1, tokens - at[lane]) for lane in range(3)]
        lanes = [lane for lane in range(3) if sizes[lane]]
        lanes.sort(key=lambda lane: sizes[lane] > 1)
        context = StreamContext(cache, Rows(lanes, [sizes[lane] for lane in lanes]), model.config.scale)
        packed = [slice(at[lane], at[lane] + sizes[lane]) for lane in lanes]
        chosen_ids = torch.cat([ids[lane, part] for lane, part in zip(lanes, packed, strict=True)])
        chosen = torch.cat([features[lane, part] for lane, part in zip(lanes, packed, strict=True)])
        heads = model(Inputs(chosen_ids.to(device), chosen.to(device)), context)["next"]
        context.commit()
        for lane, part, rows in zip(lanes, packed, heads.split([sizes[x] for x in lanes]), strict=True):
            logits[lane, part] = rows.double().cpu()
            at[lane] = part.stop
    return logits


def check_model(device: str, dtype: torch.dtype, truth: Tensor) -> dict[str, Any]:
    """Return the distances of the streamed model's logits and whether they pass."""
    outcome = {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": truth.shape[0] * truth.shape[1],
        "largest_logit": float(truth.abs().max()),
        "device_distance": distance(stream(device, dtype), truth),
        "cpu_distance": distance(stream("cpu", dtype), truth),
    }
    return outcome | {"ok": outcome["device_distance"] <= 2 * outcome["cpu_distance"] + SLACK}


def graph_microseconds(calls: list[Callable[[], object]], replays: int = 30) -> float:
    """Return the median time of one call, of a CUDA graph that makes all of them once."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for _ in range(replays + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    del kept
    return median(times[3:])


def copy_bytes_per_second() -> float:
    """Return what a kernel that copies 2 GiB moves, bytes read and written."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.itemsize
    return moved / (graph_microseconds([lambda: torch.neg(source, out=target)]) * 1e-6)


def time_decode(dtype: torch.dtype, head_dim: int, lanes: int) -> dict[str, Any]:
    """Return microseconds a call of the fused decode and of PyTorch on the same slabs, all slots visible."""
    shape = (lanes, KV_HEADS, LONG_SLOTS + WINDOW, head_dim)
    slab_bytes = 2 * lanes * KV_HEADS * shape[2] * head_dim * dtype.itemsize
    sets = max(16, min(256, -(-COLD_BYTES // slab_bytes)))
    scale = head_dim**-0.5
    position = torch.arange(lanes, device="cuda") + 5 * WINDOW
    lane = torch.arange(lanes, device="cuda")
    expire = torch.full((*shape[:2], LONG_SLOTS), reference.NEVER, device="cuda")
    frequencies = reference.rope_frequencies(head_dim, 10_000.0).cuda()
    cos, sin = reference.rope_table(position, frequencies, dtype)
    slot = LONG_SLOTS + torch.remainder(position, WINDOW)
    new = [
        torch.randn(lanes, (GROUP + 2) * KV_HEADS, head_dim, device="cuda")
        .to(dtype)
        .split((GROUP * KV_HEADS, KV_HEADS, KV_HEADS), dim=1)
        for _ in range(sets)
    ]
    slabs = [tuple(torch.randn(shape, device="cuda", dtype=dtype) for _ in "kv") for _ in range(sets)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.reshape(lanes, KV_HEADS, GROUP, head_dim)
        return scaled_dot_product_attention(grouped, k, v, scale=scale)

    def separate(q: Tensor, k_new: Tensor, v_new: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k[lane, :, slot] = reference.rotate(k_new, cos, sin)
        v[lane, :, slot] = v_new
        return attend(reference.rotate(q, cos, sin), k, v)

    def fused(q: Tensor, k_new: Tensor, v_new: Tensor, k: Tensor, v: Tensor) -> reference.Partial:
        return kernels.ring_decode(q, k_new, v_new, cos, sin, k, v, expire, lane, position, WINDOW, scale)

    def times(call: Callable[..., object], inputs: list[tuple[Tensor, ...]]) -> float:
        return graph_microseconds([lambda x=x: call(*x) for x in inputs])

    both = [(*x, *y) for x, y in zip(new, slabs, strict=True)]
    difference = distance(reference.finish(fused(*both[0])).reshape(-1), separate(*both[0]).reshape(-1))
    fused_us = times(fused, both)
    sdpa: dict[str, Any] = {}
    for backend in BACKENDS:
        with sdpa_kernel(backend):
            try:
                alone = times(attend, [(x[0], *y) for x, y in zip(new, slabs, strict=True)])
                sdpa[backend.name] = {"attention_us": alone, "with_rope_and_append_us": times(separate, both)}
            except RuntimeError as error:  # this backend does not take these shapes or this dtype
                sdpa[backend.name] = {"refused": str(error).splitlines()[0]}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": head_dim,
        "lanes": lanes,
        "slab_bytes": slab_bytes,
        "distinct_slabs": sets,
        "largest_difference_to_sdpa": difference,
        "ring_decode_us": fused_us,
        "ring_decode_bytes_per_second": slab_bytes / (fused_us * 1e-6),
        "sdpa": sdpa,
    }


def check_all() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Print and return the outcomes of both checks."""
    decode, models = [], []
    print("ring_decode against float64:  distance of the kernel | of PyTorch in the same dtype")
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            for lanes in LANES:
                outcome = check_decode(decode_case("cuda", dtype, head_dim, lanes), kernels.ring_decode)
                decode.append(outcome)
                print(
                    f"  {outcome['dtype']:>8} D {head_dim:3} lanes {lanes:2}: {outcome['kernel_distance']:.2e} | "
                    f"{outcome['torch_distance']:.2e}  append equal {outcome['slabs_equal']}  "
                    f"repeatable {outcome['repeatable']}  {'ok' if outcome['ok'] else 'FAILED'}"
                )
    print("streamed model against the CPU in float64:  distance of the device | of the CPU in the same dtype")
    truth = stream("cpu", torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        outcome = check_model("cuda", dtype, truth)
        models.append(outcome)
        print(
            f"  {outcome['dtype']:>8} {outcome['tokens']} tokens: {outcome['device_distance']:.2e} | "
            f"{outcome['cpu_distance']:.2e}  {'ok' if outcome['ok'] else 'FAILED'}"
        )
    return decode, models


def time_all(copy: float) -> list[dict[str, Any]]:
    """Print and return the times."""
    times = []
    print(f"microseconds a call, bfloat16, cold L2, in a CUDA graph; a large copy moves {copy / 1e12:.2f} TB/s")
    for head_dim in HEAD_DIMS:
        for lanes in LANES:
            outcome = time_decode(torch.bfloat16, head_dim, lanes)
            times.append(outcome)
            best = {
                name: min((x[name] for x in outcome["sdpa"].values() if name in x), default=float("nan"))
                for name in ("attention_us", "with_rope_and_append_us")
            }
            print(
                f"  D {head_dim:3} lanes {lanes:2}: ring_decode {outcome['ring_decode_us']:7.1f}"
                f" ({outcome['ring_decode_bytes_per_second'] / copy:.0%} of the copy)"
                f"   best SDPA alone {best['attention_us']:7.1f}"
                f"   with rotation and append {best['with_rope_and_append_us']:7.1f}"
            )
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="Check and time the fused decode on a CUDA device.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu-check.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: the GPU checks are skipped")
        return
    import triton

    form = kernels.decode_form("cuda", torch.bfloat16)
    assert form is not reference.ring_decode, "triton is not installed: there is no kernel to check"
    decode, models = check_all()
    report = {
        "gpu": torch.cuda.get_device_name(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "command": "python benchmarks/gpu_check.py",
        "shape": {"kv_heads": KV_HEADS, "group": GROUP, "window": WINDOW, "long_slots": LONG_SLOTS},
        "ok": all(outcome["ok"] for outcome in decode + models),
        "decode": decode,
        "model": models,
    }
    if report["ok"]:  # times of a wrong kernel say nothing
        report["copy_bytes_per_second"] = copy_bytes_per_second()
        report["times"] = time_all(report["copy_bytes_per_second"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['gpu']}: {'all checks passed' if report['ok'] else 'CHECKS FAILED'}; written to {options.out}")
    sys.exit(not report["ok"])


if __name__ == "__main__":
    main()
