"""The demo end to end with real processes and sockets, on a short stretch of the tape."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from streamattn.demo import STREAMS, DemoError, Plan, run_demo
from streamattn.tape import load_tape


def test_a_short_demo_loses_nothing_and_writes_what_it_says(tmp_path: Path) -> None:
    numbers = run_demo("trades:emini", 1600, 800.0, tmp_path, "emini")
    assert json.loads((tmp_path / "demo.json").read_text()) == numbers
    assert (numbers["events"], numbers["streams"]) == (1600, 8)
    assert (numbers["drops"], numbers["gaps"], numbers["repeats"]) == (0, 0, 0)
    assert set(numbers["latency_us"]) == {"p50", "p99", "p99_9", "max"}
    assert 0 < numbers["latency_us"]["p50"] <= numbers["latency_us"]["p99"] <= numbers["latency_us"]["max"]
    assert numbers["cache_bytes_start"] == numbers["cache_bytes_end"] > 0
    assert 0.5 < numbers["bits_per_event"] < 1.2
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_plan_is_held_out_and_the_same_for_all() -> None:
    tape = load_tape("trades:emini")
    plan = Plan("trades:emini", 50_000, 600.0, "", "")
    starts, size = plan.ranges(tape)
    assert size * STREAMS >= 50_000
    assert starts[0] == int(0.7 * len(tape))
    assert starts[-1] + size == len(tape)
    times = plan.schedule(size)
    np.testing.assert_array_equal(times, plan.schedule(size))
    assert times.size / times.max() > 500  # events per second in all


def test_a_process_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="the engine process ended early"):
        run_demo("trades:emini", 800, 800.0, tmp_path, str(tmp_path / "no-model"))
