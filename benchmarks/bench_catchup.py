"""Does one stream's catch-up delay the others? One-token latency alone, and beside 100,000 tokens of backlog.

One engine, one run: phases without and with the catch-up alternate, so both see the same machine. Latency is from the
intended arrival of an event (Poisson, open loop) to its answer on the event loop. Correctness first: the answers given
beside the catch-up equal the parallel form's. Writes build/bench-catchup.json.
"""

from __future__ import annotations

import asyncio
import json
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from streamattn.async_engine import AsyncEngine
from streamattn.checkpoint import load_checkpoint, shipped_model
from streamattn.engine import Engine, Outcome
from streamattn.frame import Frame, Result
from streamattn.model import Inputs
from streamattn.scheduler import Policy

RATE = 200.0  # events per second of the live stream
EVENTS = 1500  # of each quiet phase; a busy phase lasts as long as its catch-up
CATCH_UP = 100_000  # tokens
ROUNDS = 2
FRAME = 1000  # tokens of one catch-up frame


class Live:
    """The live stream: events at their intended times, and what came back."""

    def __init__(self, running: AsyncEngine, features: int) -> None:
        self.running = running
        random = np.random.default_rng(0)
        self.ids = random.integers(0, 3, 100_000).astype(np.int32)
        self.features = random.standard_normal((100_000, features)).astype(np.float32)
        self.pauses = random.exponential(1 / RATE, 100_000)
        self.sent = 0
        self.answers: list[np.ndarray] = []

    async def run(self, enough) -> np.ndarray:
        """Send until `enough(count)`; return the latencies in microseconds."""
        latencies: list[float] = []
        pending = 0
        idle = asyncio.Event()
        due = time.perf_counter()
        count = 0
        while not enough(count):
            i, self.sent, count = self.sent, self.sent + 1, count + 1
            due += self.pauses[i]
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            pending += 1
            idle.clear()

            def finished(outcome: Outcome, due: float = due) -> None:
                nonlocal pending
                latencies.append((time.perf_counter() - due) * 1e6)
                (result,) = outcome.messages
                assert isinstance(result, Result)
                self.answers.append(result.heads["next"])
                pending -= 1
                if not pending:
                    idle.set()

            await self.running.offer(Frame("live", 0, i, 0, self.ids[i : i + 1], self.features[i : i + 1]), finished)
        await idle.wait()
        return np.array(latencies)


async def catch_up(running: AsyncEngine, stream: str, features: int) -> None:
    random = np.random.default_rng(1)
    left = CATCH_UP // FRAME
    done = asyncio.Event()

    def finished(_: Outcome) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set()

    for i in range(CATCH_UP // FRAME):
        ids = random.integers(0, 3, FRAME).astype(np.int32)
        columns = random.standard_normal((FRAME, features)).astype(np.float32)
        frame = Frame(stream, 0, i * FRAME, 0, ids, columns, answer="last")
        await running.offer(frame, finished)
    await done.wait()


async def measure() -> dict:
    checkpoint = load_checkpoint(shipped_model())
    features = len(checkpoint.schema.features)
    engine = Engine(checkpoint.model, lanes=4, policy=Policy(queue_events=CATCH_UP), auto_open=True)
    engine.warmup()
    alone, beside, seconds = [], [], 0.0
    async with AsyncEngine(engine) as running:
        live = Live(running, features)
        await live.run(lambda count: count >= 300)  # warm
        for round_ in range(ROUNDS):
            alone.append(await live.run(lambda count: count >= EVENTS))
            start = time.perf_counter()
            backlog = asyncio.create_task(catch_up(running, f"backlog-{round_}", features))
            beside.append(await live.run(lambda _, task=backlog: task.done()))
            seconds += time.perf_counter() - start
    check(checkpoint.model, live)
    quiet, busy = np.concatenate(alone), np.concatenate(beside)
    points = {name: [float(np.quantile(x, q)) for x in (quiet, busy)] for name, q in (("p50", 0.5), ("p99", 0.99))}
    return {
        "what": "one-token latency in us, alone and beside a catch-up of another stream",
        "events": [len(quiet), len(busy)],
        "catch_up_tokens": CATCH_UP * ROUNDS,
        "catch_up_tokens_per_second": round(CATCH_UP * ROUNDS / seconds),
        **{f"{name}_us": [round(v, 1) for v in pair] for name, pair in points.items()},
        "p99_ratio": round(points["p99"][1] / points["p99"][0], 2),
    }


@torch.inference_mode()
def check(model, live: Live) -> None:
    """Compare all answers of the live stream with the parallel form."""
    n = live.sent
    inputs = Inputs(torch.from_numpy(live.ids[:n].astype(np.int64))[None], torch.from_numpy(live.features[:n])[None])
    wanted = model(inputs, model.parallel_context(n))["next"][0].numpy()
    worst = float(np.abs(np.concatenate(live.answers) - wanted).max())
    print(f"checked {n:,} answers against the parallel form: largest difference {worst:.1e}")
    assert worst < 1e-4


def main() -> None:
    torch.set_num_threads(1)
    result = asyncio.run(measure())
    result |= {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {platform.platform()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": "python benchmarks/bench_catchup.py",
    }
    out = Path("build/bench-catchup.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
