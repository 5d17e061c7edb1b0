"""How long a fan takes, and how far it can be believed: sampled continuations of the E-mini tape's unseen part.

Time: 1,000 branches of k events in one batch of the shipped model, one thread, copy of the lane included. Correctness
first: branches equal an engine of their own that is fed the same events. Belief: from places spread over the part of
the tape that was not trained on, where does the real sum of moves (up - down) fall among the branches' sums? If the fan
were right, 90 % of the ranks would lie in its middle 90 %, and what came would be as far from the fan's mean as the
branches are. Writes build/bench-flow.json.
"""

from __future__ import annotations

import json
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from streamattn.checkpoint import load_checkpoint, shipped_model
from streamattn.engine import Engine
from streamattn.flow import FlowSampler, RecentFeatures
from streamattn.model import StreamTransformer
from streamattn.tape import Tape, load_tape

BRANCHES = 1000
STEPS = (1, 10, 50)
REPEATS = {1: 200, 10: 30, 50: 12}
HISTORY = 2000  # events before the first fan
STARTS = 150  # places from which the fan is compared with what came
STARTS_BRANCHES = 200
MOVE = {"move": (-1.0, 0.0, 1.0)}


def check(model: StreamTransformer, tape: Tape) -> None:
    """Compare some branches with engines that are fed the same events."""

    def fed() -> tuple[Engine, RecentFeatures]:
        engine, recent = Engine(model, lanes=1), RecentFeatures(3, tape.features.shape[1])
        engine.open("ES").push(tape.ids[:200], tape.features[:200])
        recent.observe(tape.ids[:201], tape.features[:201])
        return engine, recent

    engine, recent = fed()
    result = engine.streams["ES"].push(tape.ids[200], tape.features[200])
    fan = FlowSampler(engine, BRANCHES).sample(result, 80, recent, keep=True)
    assert fan.features is not None
    worst = 0.0
    for branch in (0, BRANCHES // 2, BRANCHES - 1):
        other = fed()[0].streams["ES"]
        other.push(tape.ids[200], tape.features[200])
        answers = other.push(fan.ids[:, branch], fan.features[:, branch]).heads["next"]
        worst = max(worst, float(np.abs(answers - fan.heads["next"][:, branch]).max()))
    print(f"checked 3 of {BRANCHES:,} branches against engines of their own: largest difference {worst:.1e}")
    assert worst < 1e-4


def timings(model: StreamTransformer, tape: Tape) -> dict:
    """Return percentiles of the milliseconds of a fan for each number of steps."""
    engine, recent = Engine(model, lanes=8), RecentFeatures(3, tape.features.shape[1])
    result = engine.open("ES").push(tape.ids[:HISTORY], tape.features[:HISTORY])
    recent.observe(tape.ids[:HISTORY], tape.features[:HISTORY])
    sampler = FlowSampler(engine, BRANCHES, walks=MOVE)
    sampler.sample(result, 3, recent)  # warm
    found: dict = {
        "branches": BRANCHES,
        "cache_bytes": sampler.cache_bytes,
        "fork_ms": _percentiles(_fork(sampler, result)),
    }
    for steps in STEPS:
        times = []
        for _ in range(REPEATS[steps]):
            start = time.perf_counter()
            sampler.sample(result, steps, recent)
            times.append(1e3 * (time.perf_counter() - start))
        found[f"k={steps}_ms"] = _percentiles(times)
    return found


def _fork(sampler: FlowSampler, result) -> list[float]:
    times = []
    for _ in range(50):
        start = time.perf_counter()
        sampler.fork(result)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _percentiles(times: list[float]) -> dict:
    return {"repeats": len(times)} | {f"p{q}": round(float(np.percentile(times, q)), 2) for q in (50, 90, 99)}


def belief(model: StreamTransformer, tape: Tape) -> dict:
    """Return how often what came ranked in the middle of the branches, for each number of steps."""
    engine, recent = Engine(model, lanes=1), RecentFeatures(3, tape.features.shape[1])
    stream = engine.open("ES")
    sampler = FlowSampler(engine, STARTS_BRANCHES, walks=MOVE)
    random = np.random.default_rng(0)
    starts = np.linspace(HISTORY, len(tape) - max(STEPS) - 1, STARTS).astype(int)
    ranks: dict[int, list[float]] = {k: [] for k in STEPS}
    spread: dict[int, list[tuple[float, float]]] = {k: [] for k in STEPS}
    at = 0
    for start in starts.tolist():
        passed = tape.slice(at, start)
        result = stream.push(passed.ids, passed.features, answer="last")
        recent.observe(passed.ids, passed.features)
        at = start
        fan = sampler.sample(result, max(STEPS), recent)
        branches = np.cumsum(fan.ids - 1, axis=0)  # ids 0, 1, 2: down, flat, up
        came = np.cumsum(tape.ids[start : start + max(STEPS)] - 1)
        for k in STEPS:
            below, equal = (branches[k - 1] < came[k - 1]).mean(), (branches[k - 1] == came[k - 1]).mean()
            ranks[k].append(float(below + random.random() * equal))  # ties are broken by chance
            spread[k].append((float(came[k - 1] - branches[k - 1].mean()), float(branches[k - 1].std())))
    report = {}
    for k in STEPS:
        r, (error, std) = np.array(ranks[k]), np.array(spread[k]).T
        report[f"k={k}"] = {
            "in_middle_50_percent": round(float(((r > 0.25) & (r < 0.75)).mean()), 3),
            "in_middle_90_percent": round(float(((r > 0.05) & (r < 0.95)).mean()), 3),
            "rms_of_what_came_less_mean_of_fan": round(float(np.sqrt((error**2).mean())), 3),
            "rms_spread_of_fan": round(float(np.sqrt((std**2).mean())), 3),
        }
    return {"starts": STARTS, "branches": STARTS_BRANCHES, "borrowed": recent.borrowed, **report}


def main() -> None:
    torch.set_num_threads(1)
    model = load_checkpoint(shipped_model()).model
    tape = load_tape("trades:emini")
    tape = tape.slice(int(0.7 * len(tape)), len(tape))
    check(model, tape)
    result = {
        "what": "ms of a fan of 1,000 branches, and ranks of what came among them; unseen part of the E-mini tape",
        "timings": timings(model, tape),
        "belief": belief(model, tape),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {platform.platform()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": "python benchmarks/bench_flow.py",
    }
    out = Path("build/bench-flow.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
