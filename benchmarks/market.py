"""What the market model is held to: trained on one part of real order-book days, scored on the rest, and on others.

    python benchmarks/market.py --data FOLDER [--only NAME]

FOLDER holds LOBSTER's sample files (https://lobsterdata.com; they may not be passed on). Every line of the table is two
commands of `streamattn`, one process each and one thread; the table says whether its bar holds. Writes
build/market.json and a picture of each score. Exits with 1 where a bar does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OUT = Path("build")
HEADS = ("--head", "gap", "--head", "move")
OWN = ("--mirror", *HEADS)  # to be used on the instrument it was trained on
OTHER = ("--mirror", *HEADS, "--jitter", "1.5", "--epochs", "10")  # to be used on any
COARSE = "?tick=2000"  # shown again with a tick of 20 cents: for stocks whose spread is a tick or two


@dataclass(frozen=True)
class Run:
    """One model and what it is scored on. `bar` is in bits; None: what counts is to beat the online n-gram."""

    name: str
    train: tuple[str, ...]
    score: str
    options: tuple[str, ...]
    bar: float | None = None


GOOG, AMZN = "GOOG_2012-06-21_1", "AMZN_2012-06-21_1"
RUNS = (
    Run("goog-10", ("GOOG_2012-06-21_10",), "GOOG_2012-06-21_10", OWN, 2.18),
    Run("amzn-5", ("AMZN_2012-06-21_5",), "AMZN_2012-06-21_5", OWN, 2.22),
    Run("goog-to-amzn", (GOOG, GOOG + COARSE), AMZN, OTHER),
    Run("amzn-to-goog", (AMZN, AMZN + COARSE), GOOG, OTHER),
    Run("goog-to-coarse-amzn", (GOOG, GOOG + COARSE), AMZN + "?tick=5000", OTHER),
    Run("amzn-to-coarse-goog", (AMZN, AMZN + COARSE), GOOG + "?tick=5000", OTHER),
    # The model for a third stock; here only its own tapes' last fifths are left to score it on.
    Run("both-goog", (GOOG, AMZN, GOOG + COARSE, AMZN + COARSE), GOOG, OTHER),
    Run("both-amzn", (GOOG, AMZN, GOOG + COARSE, AMZN + COARSE), AMZN, OTHER),
)


def spec(data: Path, sample: str) -> str:
    """Return the tape of a sample, which may end in ?tick=N."""
    name, mark, option = sample.partition("?")
    return f"lobster:{data / f'LOBSTER_SampleFile_{name}.zip'}{mark}{option}"


def streamattn(*words: str) -> tuple[str, float]:
    """Return what a command printed, and the seconds it took."""
    print("$ streamattn", shlex.join(words), flush=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "streamattn", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return done.stdout, time.perf_counter() - start


def measure(run: Run, data: Path, trained: dict[tuple[str, ...], tuple[Path, float]]) -> dict[str, Any]:
    """Return what one run came to; models that two runs share are trained once."""
    key = (*run.train, *run.options)
    if key not in trained:
        folder = OUT / f"market-{run.name}"
        tapes = [word for sample in run.train for word in ("--tape", spec(data, sample))]
        trained[key] = folder, streamattn("train", *tapes, *run.options, "--out", str(folder))[1]
    folder, seconds = trained[key]
    picture = str(OUT / f"market-{run.name}.png")
    printed, scoring = streamattn(
        *("eval", "--model", str(folder), "--tape", spec(data, run.score), "--json", "--picture", picture)
    )
    score = json.loads(printed)
    rival = score["ngram_online_bits"]
    bar = rival if run.bar is None else run.bar
    return {
        "train": run.train,
        "tape": run.score,
        "options": run.options,
        "training_seconds": round(seconds, 1),
        "scoring_seconds": round(scoring, 1),
        "bar": bar,
        "holds": score["bits_per_event"] < rival and score["bits_per_event"] <= bar,
        **score,
    }


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with LOBSTER's sample zips")
    parser.add_argument("--only", choices=[run.name for run in RUNS], help="one run")
    arguments = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    trained: dict[tuple[str, ...], tuple[Path, float]] = {}
    chosen = [run for run in RUNS if arguments.only in (None, run.name)]
    found = {run.name: measure(run, arguments.data, trained) for run in chosen}
    (OUT / "market.json").write_text(json.dumps(found, indent=1) + "\n")
    table = Table(title="next event, bits (lower is better)")
    for column in ("run", "events", "model", "online n-gram", "bar", "gap / rival", "move / rival", "training"):
        table.add_column(column)
    for name, row in found.items():
        gap, move = row["heads"]["gap"], row["heads"]["move"]
        table.add_row(
            name,
            f"{row['events']:,}",
            f"{row['bits_per_event']:.4f}",
            f"{row['ngram_online_bits']:.4f}",
            f"{row['bar']:.3f} {'holds' if row['holds'] else 'FAILS'}",
            f"{gap['pinball']:.3f} / {min(gap['rivals'].values()):.3f}",
            f"{move['bits']:.3f} / {min(move['rivals'].values()):.3f}",
            f"{row['training_seconds']:.0f} s",
        )
    Console().print(table)
    sys.exit(any(not row["holds"] for row in found.values()))


if __name__ == "__main__":
    main()
