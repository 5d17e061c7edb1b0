"""The demo: a recorded tape replayed over ZeroMQ through a running engine, scored by its subscriber.

Four processes: this one shows progress and the result; a publisher sends eight streams on schedule; `streamattn run` is
the engine; a subscriber collects the predictions. Latency is taken from the time at which an event was *meant* to be
sent, so that a stall counts for every event that it delayed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from streamattn.errors import StreamattnError
from streamattn.frame import Control, Frame, Reply, Result
from streamattn.ngram import best_online
from streamattn.scores import event_bits
from streamattn.tape import Tape, load_tape

STREAMS = 8
TRAINED = 0.7  # of the tape: the shipped model's training range
HEAD = "next"


class DemoError(StreamattnError):
    """The demo could not be run to its end."""


@dataclass(frozen=True)
class Plan:
    """What is sent when. Every process makes the same plan from the same arguments."""

    tape: str
    events: int
    rate: float
    input_url: str
    result_url: str

    def segments(self, tape: Tape) -> list[Tape]:
        """Return one segment of the held-out part of the tape for each stream, all of the same length."""
        starts, size = self.ranges(tape)
        return [tape.slice(start, start + size) for start in starts]

    def ranges(self, tape: Tape) -> tuple[list[int], int]:
        """Return where the segments start, spread evenly, and their length; they overlap if they must."""
        first = int(len(tape) * TRAINED)
        size = min(-(-self.events // STREAMS), len(tape) - first)
        last = len(tape) - size
        return [first + (last - first) * i // (STREAMS - 1) for i in range(STREAMS)], size

    def schedule(self, segment_events: int) -> np.ndarray:
        """Return the intended sending times [STREAMS, n] in seconds from the start: Poisson arrivals per stream."""
        pauses = np.random.default_rng(7).exponential(STREAMS / self.rate, (STREAMS, segment_events))
        return pauses.cumsum(axis=1)


def stream_name(index: int) -> str:
    """Return the name of a demo stream."""
    return f"ES-{index}"


# --- publisher process -----------------------------------------------------------------------------------------------


async def publish(plan: Plan, commands: TextIO, output: TextIO) -> None:
    """Send the streams on schedule, once told to go; until then ask the engine to open them."""
    from streamattn.connectors import open_sink

    segments = plan.segments(load_tape(plan.tape))
    times = plan.schedule(len(segments[0]))
    order = np.argsort(times, axis=None)
    async with open_sink(plan.input_url) as sink:
        go = asyncio.create_task(asyncio.to_thread(commands.readline))
        while not go.done():  # a subscriber that has not joined yet would miss the first frames
            for index in range(STREAMS):
                await sink.send(Control(stream_name(index), 1, "open", index))
            await asyncio.wait({go}, timeout=0.05)
        frames = {index: _frames(segment, stream_name(index)) for index, segment in enumerate(segments)}
        start = time.monotonic_ns() + 200_000_000
        _say(output, start_ns=start)
        for flat in order:
            stream, event = divmod(int(flat), times.shape[1])
            wait = start + times[stream, event] * 1e9 - time.monotonic_ns()
            if wait > 0:
                time.sleep(wait * 1e-9)  # noqa: ASYNC251 -- nothing else runs here, and the loop's timers are coarser
            await sink.send(frames[stream][event])
        _say(output, sent=len(order), seconds=(time.monotonic_ns() - start) / 1e9)
        await asyncio.to_thread(commands.readline)  # stay up until all answers are in


def _frames(segment: Tape, stream: str) -> list[Frame]:
    times = segment.event_ns.tolist()
    return [
        Frame(stream, 1, i, times[i], segment.ids[i : i + 1], segment.features[i : i + 1]) for i in range(len(segment))
    ]


# --- subscriber process ----------------------------------------------------------------------------------------------


async def subscribe(plan: Plan, out: Path, commands: TextIO, output: TextIO) -> None:
    """Collect the predictions of every event with their time of receipt; write them to `out`."""
    from streamattn.connectors import open_source

    segments = plan.segments(load_tape(plan.tape))
    n = len(segments[0])
    received = np.zeros((STREAMS, n), np.int64)
    logits = np.zeros((STREAMS, n, len(segments[0].schema.symbols)), np.float32)
    repeats = missing = 0
    names = {stream_name(index): index for index in range(STREAMS)}
    opened: set[int] = set()
    stop = asyncio.create_task(asyncio.to_thread(commands.readline))
    async with open_source(plan.result_url) as source:
        iterator = source.frames()
        count, shown = 0, 0.0
        while count < STREAMS * n:
            reading = asyncio.ensure_future(anext(iterator))
            await asyncio.wait({reading, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                reading.cancel()
                break
            now = time.monotonic_ns()
            for delivery in reading.result():
                message: Any = delivery.message
                delivery.acknowledge()
                if isinstance(message, Reply) and len(opened) < STREAMS:
                    opened.add(names[message.stream])
                    if len(opened) == STREAMS:
                        _say(output, ready=True)
                if isinstance(message, Result):
                    stream, event = names[message.stream], message.sequence
                    repeats += int(received[stream, event] != 0)
                    missing += message.missing
                    received[stream, event] = now
                    logits[stream, event] = message.heads[HEAD][0]
                    count += 1
            if time.monotonic() - shown > 0.1:
                shown = time.monotonic()
                _say(output, received=count)
    np.savez(out, received=received, logits=logits, repeats=repeats, missing=missing)
    _say(output, received=count, finished=True)


def _say(output: TextIO, **values: object) -> None:
    output.write(json.dumps(values) + "\n")
    output.flush()


# --- the process that shows it ---------------------------------------------------------------------------------------


def run_demo(tape: str, events: int, rate: float, out: Path, model: str) -> dict[str, Any]:
    """Run the demo and return its numbers; they and a picture are written to `out`.

    Raises:
        DemoError: a process ended early; the message holds the end of its output.
    """
    out.mkdir(parents=True, exist_ok=True)
    ports = _free_ports(2)
    plan = Plan(tape, events, rate, f"zmq+pub://127.0.0.1:{ports[0]}?bind=1", f"zmq+sub://127.0.0.1:{ports[1]}")
    with tempfile.TemporaryDirectory() as temporary:
        processes = _Processes(plan, Path(temporary), model, ports)
        try:
            measured = processes.run()
        finally:
            processes.end()
    return _report(plan, measured, out)


def _free_ports(count: int) -> list[int]:
    import socket

    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@dataclass
class Measured:
    """What the processes found."""

    start_ns: int
    sent_seconds: float
    received: np.ndarray
    logits: np.ndarray
    repeats: int
    missing: int
    engine: dict[str, Any]


class _Processes:
    """Publisher, engine and subscriber: started, watched, ended."""

    def __init__(self, plan: Plan, folder: Path, model: str, ports: Sequence[int]) -> None:
        self.plan, self.folder = plan, folder
        self.logs = {name: folder / f"{name}.log" for name in ("publisher", "engine", "subscriber")}
        role = [sys.executable, "-m", "streamattn.demo"]
        options = [
            plan.tape,
            str(plan.events),
            str(plan.rate),
            plan.input_url,
            plan.result_url,
            str(folder / "got.npz"),
        ]
        engine = [
            *(sys.executable, "-m", "streamattn", "run", "--model", model, "--lanes", str(STREAMS)),
            *("--source", f"zmq+sub://127.0.0.1:{ports[0]}", "--sink", f"zmq+pub://127.0.0.1:{ports[1]}?bind=1"),
            *("--stats-file", str(folder / "engine.json"), "--quiet"),
        ]
        self.lines: dict[subprocess.Popen[str], queue.Queue[str]] = {}
        self.readers: list[threading.Thread] = []
        self.engine = self._start("engine", engine)
        self.subscriber = self._start("subscriber", [*role, "subscribe", *options])
        self.publisher = self._start("publisher", [*role, "publish", *options])

    def _start(self, name: str, command: list[str]) -> subprocess.Popen[str]:
        with self.logs[name].open("w") as log:
            pipe = subprocess.PIPE
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment)
        self.lines[process] = lines = queue.Queue()
        reader = threading.Thread(target=_read_lines, args=(process.stdout, lines), name=f"demo-{name}", daemon=True)
        reader.start()
        self.readers.append(reader)
        return process

    def run(self) -> Measured:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            task = progress.add_task("starting", total=None)
            self._expect(self.subscriber, "ready")
            self._tell(self.publisher, "go")
            start_ns = int(self._expect(self.publisher, "start_ns")["start_ns"])
            total = STREAMS * -(-self.plan.events // STREAMS)
            progress.update(task, description="replaying", total=total)
            while not (line := self._line(self.subscriber)).get("finished"):
                progress.update(task, completed=line.get("received", 0))
                if self.publisher.poll() is not None:
                    raise self._broken("publisher")
            progress.update(task, completed=line["received"], total=line["received"])
        sent = self._expect(self.publisher, "sent")
        self._tell(self.publisher, "done")
        self.engine.terminate()
        self.engine.wait(timeout=20)
        got = np.load(self.folder / "got.npz")
        engine = json.loads((self.folder / "engine.json").read_text())
        return Measured(
            start_ns, sent["seconds"], got["received"], got["logits"], int(got["repeats"]), int(got["missing"]), engine
        )

    def _tell(self, process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()

    def _line(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """Return what a process said next; notice meanwhile if any of them ends early."""
        while True:
            try:
                line = self.lines[process].get(timeout=0.2)
            except queue.Empty:
                failed = [name for name in self.logs if getattr(self, name).poll() not in (None, 0)]
                if failed:
                    raise self._broken(failed[0]) from None
                continue
            if not line:
                raise self._broken()
            return json.loads(line)

    def _expect(self, process: subprocess.Popen[str], key: str) -> dict[str, Any]:
        while key not in (line := self._line(process)):
            pass
        return line

    def _broken(self, name: str = "") -> DemoError:
        time.sleep(0.2)  # the one that failed first has had time to say why
        ended = {n: getattr(self, n).poll() for n in self.logs}
        first = name or next((n for n, code in ended.items() if code not in (None, 0)), "subscriber")
        tail = self.logs[first].read_text()[-2000:]
        return DemoError(f"the {first} process ended early (exit code {ended[first]}):\n{tail}")

    def end(self) -> None:
        for process in (self.publisher, self.engine, self.subscriber):
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            assert process.stdin is not None
            process.stdin.close()
        for reader in self.readers:
            reader.join()


def _read_lines(stream: TextIO, lines: queue.Queue[str]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put("")


def _report(plan: Plan, measured: Measured, out: Path) -> dict[str, Any]:
    tape = load_tape(plan.tape)
    segments = plan.segments(tape)
    n = len(segments[0])
    answered = measured.received > 0
    intended = measured.start_ns + plan.schedule(n) * 1e9
    latency_us = np.sort((measured.received - intended)[answered]) / 1e3
    # The answer to event i predicts event i + 1 of its stream; the last one of a stream predicts nothing that was sent.
    bits = [event_bits(measured.logits[i, :-1], segment.ids[1:]) for i, segment in enumerate(segments)]
    first = int(len(tape) * TRAINED)
    order, online = best_online(tape.ids[:first], tape.ids[first:], num_symbols=len(tape.schema.symbols))
    rival = [online[start - first + 1 : start - first + n] for start in plan.ranges(tape)[0]]
    numbers = {
        "events": int(answered.sum()),
        "streams": STREAMS,
        "drops": int((~answered).sum()),
        "gaps": measured.missing + int(measured.engine["counters"]["gaps"]),
        "bits_per_event": round(float(np.mean(np.concatenate(bits))), 4),
        "ngram_bits_per_event": round(float(np.mean(np.concatenate(rival))), 4),
        "ngram_order": order,
        "events_per_second": round(answered.sum() / measured.sent_seconds, 1),
        "latency_us": {
            name: round(float(np.quantile(latency_us, q)), 1)
            for name, q in (("p50", 0.5), ("p99", 0.99), ("p99_9", 0.999), ("max", 1.0))
        },
        "engine_latency_us": measured.engine["latency_us"],  # from receipt to the end of the step
        "cache_bytes_start": measured.engine["cache_bytes_start"],
        "cache_bytes_end": measured.engine["cache_bytes_end"],
        "repeats": measured.repeats,
    }
    (out / "demo.json").write_text(json.dumps(numbers, indent=1) + "\n")
    _picture(np.stack(bits), np.stack(rival), latency_us, numbers, out / "demo.png")
    return numbers


def _picture(bits: np.ndarray, rival: np.ndarray, latency_us: np.ndarray, numbers: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    counts = np.arange(1, bits.shape[1] + 1) * STREAMS
    for values, label, colour in ((bits, "streamattn", "tab:blue"), (rival, "online n-gram", "tab:orange")):
        running = values.sum(0).cumsum() / counts
        left.plot(counts[20:], running[20:], color=colour, label=f"{label}: {running[-1]:.3f} at the end")
    left.set(
        xlabel="events, all streams",
        ylabel="bits per event so far",
        title="Next price move: running score (lower is better)",
    )
    left.legend()
    edges = np.geomspace(max(latency_us[0], 1.0), latency_us[-1], 80)
    right.hist(latency_us, bins=edges, color="tab:blue")
    right.set(
        xscale="log", yscale="log", xlabel="µs from intended sending time to receipt", ylabel="events", title="Latency"
    )
    styles = (("p50", "solid"), ("p99", "dashed"), ("p99_9", "dotted"))
    for name, style in styles:
        value = numbers["latency_us"][name]
        right.axvline(value, color="black", linestyle=style, label=f"{name.replace('_', '.')}: {value / 1e3:,.2f} ms")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _main() -> None:
    parser = argparse.ArgumentParser(description="one process of the demo; start it with `streamattn demo`")
    parser.add_argument("role", choices=["publish", "subscribe"])
    parser.add_argument("tape")
    parser.add_argument("events", type=int)
    parser.add_argument("rate", type=float)
    parser.add_argument("input_url")
    parser.add_argument("result_url")
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    plan = Plan(a.tape, a.events, a.rate, a.input_url, a.result_url)
    if a.role == "publish":
        asyncio.run(publish(plan, sys.stdin, sys.stdout))
    else:
        asyncio.run(subscribe(plan, a.out, sys.stdin, sys.stdout))


if __name__ == "__main__":
    _main()
