"""A model of one's own on float features: two patterns, two heads, trained in parallel, run as a stream, rolled back.

The signal is a noisy oscillation. Given its past, the model says how high the next value will be (three quantiles) and
whether it will be above this one (two classes).
"""

import argparse

import numpy as np
import torch
from torch import nn

from streamattn import Engine, Global, Head, Inputs, Kernel, ModelConfig, Pattern, StreamTransformer, Strided, Window

LEVELS = (0.1, 0.5, 0.9)


def signal(seed: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 2 * np.pi) + 0.3 * np.arange(size)
    return (np.sin(phase) + 0.3 * rng.standard_normal(size)).astype(np.float32)


def new_model() -> StreamTransformer:
    torch.manual_seed(0)
    near = Pattern(Window(16), Strided(every=8, keep=8))  # the last 16 values, then every eighth of 64 more
    far = Pattern(Window(8), Global(first=2), Kernel(features=16, decay=0.99))  # and all the rest in a fading state
    heads = (Head("value", "quantiles", len(LEVELS), LEVELS), Head("rises", "classes", 2))
    return StreamTransformer(
        ModelConfig((near, far), width=32, q_heads=4, kv_heads=2, head_dim=8, ffn=64, heads=heads, features=1)
    )


def loss(outputs: dict[str, torch.Tensor], now: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
    error = then.unsqueeze(-1) - outputs["value"]
    levels = torch.tensor(LEVELS)
    pinball = torch.maximum(levels * error, (levels - 1) * error).mean()
    return pinball + nn.functional.cross_entropy(outputs["rises"].flatten(0, 1), (then > now).long().flatten())


def train(model: StreamTransformer, steps: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        x = torch.from_numpy(np.stack([signal(1000 * step + i, 65) for i in range(8)]))
        outputs = model(Inputs(features=x[:, :-1, None]), model.parallel_context(64))
        value = loss(outputs, x[:, :-1], x[:, 1:])
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {value.item():.3f}")


def main(steps: int, events: int) -> None:
    torch.set_num_threads(1)  # small matrices: more threads are slower
    model = new_model()
    train(model, steps)
    engine = Engine(model, lanes=1, marks=1)
    stream, x = engine.open("sensor-7"), signal(999_999, events + 1)
    heads = stream.push(features=x[:-1, None]).heads  # as one push or as many: the same numbers
    inside = (heads["value"][:, 0] <= x[1:]) & (x[1:] <= heads["value"][:, 2])
    right = heads["rises"].argmax(1) == (x[1:] > x[:-1])
    print(f"{events} events streamed: {inside.mean():.0%} inside the 10-90 % band, {right.mean():.0%} of rises right")

    mark = stream.mark()  # what would follow, if the next value were 2?
    supposed = stream.push(features=[2.0]).heads["value"][0]
    stream.rollback(mark)
    actual = stream.push(features=[x[-1]]).heads["value"][0]
    print(f"median after 2.00: {supposed[1]:.2f}; rolled back, after {x[-1]:.2f}: {actual[1]:.2f}")
    print(f"position {stream.position}, {engine.cache_bytes:,} bytes of cache, then as now")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--events", type=int, default=2000, help="events to stream")
    args = parser.parse_args()
    main(args.steps, args.events)
