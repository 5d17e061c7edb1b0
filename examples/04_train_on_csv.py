"""Train on a CSV file of trades, then score the model on the rest of it through the streaming engine.

The file needs a header with a time, a price and a volume; `streamattn.tape` says which names it takes. The same as

    streamattn train --tape trades:FILE --out DIR && streamattn eval --model DIR --tape trades:FILE
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from streamattn import load_checkpoint, save_checkpoint
from streamattn.tape import load_tape
from streamattn.train import TrainOptions, evaluate, train


def write_made_up_tape(path: Path, trades: int) -> None:
    """Write trades whose next step repeats the last one when the last volume was large, and reverts it when small."""
    rng = np.random.default_rng(0)
    start, price, step = np.datetime64("2024-01-02T09:00:00.000", "ms"), 1000, 1
    time_ms = rng.integers(1, 400, trades).cumsum()
    rows = ["time,price,volume"]
    for ms in time_ms.tolist():
        volume = int(rng.choice([1, 20]))
        price += step
        rows.append(f"{start + ms},{price / 4},{volume}")
        if rng.random() < 0.9:
            step = step if volume == 20 else -step
        else:
            step = int(rng.choice([-1, 1]))
    path.write_text("\n".join(rows) + "\n")


def main(tape_path: Path | None, epochs: int, out: Path | None) -> None:
    torch.set_num_threads(1)  # small matrices: more threads are slower, and change the order of sums
    with tempfile.TemporaryDirectory() as temporary:
        if tape_path is None:
            tape_path = Path(temporary) / "trades.csv"
            write_made_up_tape(tape_path, 6000)
            print(f"no --tape given: made up {tape_path}, in a temporary folder")
        spec = f"trades:{tape_path}"
        tape = load_tape(spec)
        print(f"{len(tape):,} events, features {', '.join(tape.schema.features)}")
        options = TrainOptions(epochs=epochs, segments=8, chunk=64, window=32, width=32, head_dim=8, ffn=64)

        def progress(done: int, total: int, text: str) -> None:
            if "validation" in text:
                print(f"step {done} of {total}: {text}")

        folder = out or Path(temporary) / "model"
        save_checkpoint(train({spec: tape}, options, progress), folder)
        if out is not None:
            print(f"wrote {out}")
        score = evaluate(load_checkpoint(folder), tape)
        print(f"scored {score.events} events, {score.start} to {score.stop}, none of them trained on:")
        print(f"  streaming engine  {score.bits_per_event:.4f} bits per event")
        print(f"  parallel form     {score.parallel_bits_per_event:.4f}")
        print(f"  online n-gram     {score.ngram_online_bits:.4f} (order {score.ngram_order}; it sees no features)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tape", type=Path, help="CSV file of trades; without it one is made up")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, help="folder for the checkpoint; without it nothing is kept")
    args = parser.parse_args()
    main(args.tape, args.epochs, args.out)
