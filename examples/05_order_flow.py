"""Where may the price go? A live stream on an engine's thread, and a fan of sampled continuations of it.

The trades are made up, 50 ms apart. The live stream goes on while the fan is drawn: only the copy of its lane is made
between two of its steps.
"""

import argparse
import asyncio
import time

import numpy as np
import torch

import streamattn
from streamattn.flow import Fan, FlowSampler, RecentFeatures
from streamattn.tape import TRADE_SYMBOLS, trade_events

STREAM = "ES"


def made_up_events(trades: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    price = 1640 + 0.25 * rng.choice([-1, 0, 0, 1], trades).cumsum()
    _, ids, features = trade_events(np.arange(trades) * 50_000_000, price, rng.integers(1, 20, trades))
    return ids, features


def show(fan: Fan) -> None:
    low, middle, high = (fan.levels.index(level) for level in (0.05, 0.5, 0.95))
    print("events ahead   moves up less moves down: 5 %, median, 95 %   odds of " + ", ".join(TRADE_SYMBOLS))
    odds = fan.frequencies()
    for k in sorted({1, 10, len(fan.ids)} & set(range(1, len(fan.ids) + 1))):
        move = fan.walks["move"][k - 1]
        shares = "  ".join(f"{share:.2f}" for share in odds[k - 1])
        print(f"{k:12}   {move[low]:+25.0f}{move[middle]:+8.0f}{move[high]:+7.0f}          {shares}")


async def main(branches: int, steps: int) -> None:
    torch.set_num_threads(1)  # a small model: more threads only wait for each other
    checkpoint = streamattn.load_checkpoint(streamattn.shipped_model("emini"))
    engine = streamattn.Engine(checkpoint.model, lanes=8)
    recent = RecentFeatures(len(checkpoint.schema.symbols), len(checkpoint.schema.features))
    sampler = FlowSampler(engine, branches, walks={"move": (-1, 0, 1)})  # weights of down, flat, up
    print(f"{branches} branches hold {sampler.cache_bytes:,} bytes; the live lanes {engine.cache_bytes:,}")
    ids, features = made_up_events(600)
    async with streamattn.AsyncEngine(engine) as running:
        stream = await running.open(STREAM)
        result = await stream.push(ids[:500], features[:500], answer="last")
        recent.observe(ids[:500], features[:500])
        await running.call(lambda: sampler.fork(result))  # on the engine's thread, as it owns the cache
        start = time.perf_counter()
        drawing = asyncio.create_task(asyncio.to_thread(sampler.draw, steps, recent))
        answered = 0
        for i in range(500, 600):  # meanwhile
            answered += len((await stream.push(ids[i], features[i])).heads["next"])
        fan = await drawing
    print(
        f"{steps} events of each branch in {time.perf_counter() - start:.2f} s; {answered} live events answered since"
    )
    show(fan)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--branches", type=int, default=1000, help="continuations in one batch")
    parser.add_argument("--steps", type=int, default=50, help="events of each")
    args = parser.parse_args()
    asyncio.run(main(args.branches, args.steps))
