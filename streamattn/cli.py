"""Sparse attention on token streams that never end: run a model on live topics, train one, score one.

Exit codes: 0 done, 1 it failed (a transport, a damaged file; trying again may help), 2 wrong usage of the command line,
78 a configuration or checkpoint that cannot work. The last line on standard error says what and what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from streamattn.config import PolicyConfig, RunConfig, load_config
from streamattn.errors import CheckpointError, ConfigError, StreamattnError

if TYPE_CHECKING:
    import torch

    from streamattn.engine import Engine
    from streamattn.evaluate import Score
    from streamattn.frame import Sink, Source
    from streamattn.model import ModelConfig
    from streamattn.runtime import Runtime

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
errors = Console(stderr=True)
ModelOption = Annotated[str, typer.Option("--model", help="checkpoint folder, or the name of a shipped model (emini)")]
TapeOption = Annotated[str, typer.Option("--tape", help="CODEC:PATH, e.g. trades:ticks.csv or trades:emini")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]


def main() -> None:
    """Run the command line; errors that streamattn raises on purpose become one line and an exit code."""
    try:
        app(prog_name="streamattn")
    except StreamattnError as error:
        errors.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(78 if isinstance(error, ConfigError | CheckpointError) else 1)


# --- run -------------------------------------------------------------------------------------------------------------


@app.command()
def run(
    model: Annotated[str | None, typer.Option(help="checkpoint folder, or the name of a shipped model")] = None,
    source: Annotated[list[str] | None, typer.Option(help="URL of a source; may be repeated")] = None,
    sink: Annotated[list[str] | None, typer.Option(help="URL of a sink; may be repeated")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with the same settings and more")] = None,
    lanes: Annotated[int | None, typer.Option(help="streams held at once")] = None,
    stats_file: Annotated[Path | None, typer.Option(help="write counters and latencies here at the end")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="log errors only")] = False,
) -> None:
    """Join topics to a model: frames come in from the sources, predictions go out to the sinks, until SIGTERM or ^C."""
    logging.basicConfig(
        level=logging.ERROR if quiet else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    settings = (RunConfig() if config is None else load_config(config)).replaced(model, source, sink, lanes)
    if stats_file is not None:
        _check_writable(stats_file, "--stats-file")  # not only at the end of a long run
    from streamattn.connectors import open_sink, open_source
    from streamattn.runtime import Runtime

    sources = [open_source(endpoint.url) for endpoint in settings.source]
    sinks = [open_sink(endpoint.url) for endpoint in settings.sink]
    engine = _engine(settings)
    runtime = Runtime(engine, sources, sinks, in_flight=settings.in_flight)
    before = engine.cache_bytes
    log = logging.getLogger("streamattn")
    log.info("serving %s on %d lanes with %d bytes of cache", settings.model, settings.lanes, before)
    try:
        asyncio.run(_run_until_stopped(runtime))
    finally:
        report = _run_report(engine, runtime, before)
        if stats_file is not None:
            stats_file.write_text(json.dumps(report, indent=1) + "\n")
        log.info("done: %s", json.dumps(report))


def _check_writable(path: Path, option: str) -> None:
    try:
        path.touch()
    except OSError as error:
        raise ConfigError(f"{option}: expected a file that can be written, found {path}: {error.strerror}") from None


def _engine(settings: RunConfig) -> Engine:
    import gc

    import torch

    from streamattn.engine import Engine

    torch.set_num_threads(settings.threads)
    assert settings.model is not None
    policy = _policy(settings.policy)
    model = _load(settings.model).model
    _check_memory(settings.lanes + settings.marks, model.config, model.dtype)
    engine = Engine(model, lanes=settings.lanes, marks=settings.marks, policy=policy, auto_open=True)
    engine.warmup()
    gc.collect()
    gc.freeze()  # what start-up made is not looked at again by every collection
    return engine


def _check_memory(rows: int, config: ModelConfig, dtype: torch.dtype) -> None:
    """Refuse a cache that this machine cannot hold: the system would grant it, and end the process when it fills up."""
    lane = sum(pattern.memory_bytes(config.kv_heads, config.head_dim, dtype) for pattern in config.patterns)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if rows * lane > memory:
        raise ConfigError(
            f"lanes, marks: expected a cache that fits into {memory:,} bytes of memory, found {rows:,} rows of "
            f"{lane:,} bytes; take fewer, or a model with a smaller window"
        )


def _policy(config: PolicyConfig) -> Any:
    from streamattn.scheduler import Policy

    values = {name: getattr(config, name) for name in config.__struct_fields__ if name != "deadline_ms"}
    return Policy(deadline_ns=config.deadline_ns, **values)


def _load(name: str) -> Any:
    from streamattn.checkpoint import load_checkpoint, shipped_model

    if Path(name).is_dir():
        return load_checkpoint(name)
    shipped = sorted(folder.name for folder in shipped_model("").iterdir() if folder.is_dir())
    if name not in shipped:
        raise CheckpointError(
            f"model: expected a folder written by `streamattn train --out` or a shipped model ({', '.join(shipped)}), "
            f"found {name!r}"
        )
    return load_checkpoint(shipped_model(name))


async def _run_until_stopped(runtime: Runtime) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, runtime.stop)
    await runtime.run()


def _run_report(engine: Engine, runtime: Runtime, cache_bytes_start: int) -> dict[str, Any]:
    stats = runtime.stats
    return {
        "frames": stats.frames,
        "answered": stats.answered,
        "dropped": dict(stats.dropped),
        "ignored": stats.ignored,
        "results": stats.results,
        "events": stats.events,
        "faults": stats.faults,
        "failed": stats.failed,
        "latency_us": stats.latency.to_dict(),
        "counters": engine.scheduler.counters.to_dict(),
        "sources": [{"name": source.name, **asdict(source.stats)} for source in runtime.sources],
        "sinks": [{"name": sink.name, **asdict(sink.stats)} for sink in runtime.sinks],
        "cache_bytes_start": cache_bytes_start,
        "cache_bytes_end": engine.cache_bytes,
    }


@app.command()
def replay(
    recording: Annotated[Path, typer.Argument(help="file written by a file:// sink")],
    sink: Annotated[list[str], typer.Option(help="URL of a sink; may be repeated")],
    speed: Annotated[
        float, typer.Option(help="1 = as recorded, 10 = ten times as fast, inf = as fast as possible")
    ] = 1.0,
) -> None:
    """Send a recorded file of frames to sinks again. A zmq+pub sink loses what its subscribers are too slow or too
    late for; zmq+push waits for its peer."""
    from streamattn.connectors import open_sink
    from streamattn.connectors.files import FileSource

    sinks = [open_sink(url) for url in sink]
    source = FileSource(recording, speed=speed)
    asyncio.run(_copy(source, sinks))
    bad = f", dropped {source.stats.bad_messages} damaged ones" if source.stats.bad_messages else ""
    errors.print(f"sent {source.stats.messages} messages{bad}", highlight=False)


async def _copy(source: Source, sinks: Sequence[Sink]) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for connector in (*sinks, source):
            await stack.enter_async_context(connector)
        async for deliveries in source.frames():
            for delivery in deliveries:
                for target in sinks:
                    await target.send(delivery.message)
                delivery.acknowledge()


# --- train, eval -----------------------------------------------------------------------------------------------------


@app.command()
def train(
    tape: Annotated[list[str], typer.Option("--tape", help="CODEC:PATH; may be repeated")],
    out: Annotated[Path, typer.Option(help="folder of the checkpoint")],
    fraction: Annotated[float, typer.Option(help="of each tape that is trained on, from its start")] = 0.8,
    layers: int = 2,
    width: int = 48,
    window: int = 64,
    first: Annotated[int, typer.Option(help="first tokens of a stream that stay visible")] = 4,
    epochs: int = 8,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="train on the tapes with up and down exchanged, too")
    ] = False,
    learning_rate: float = 3e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    head: Annotated[
        list[str] | None, typer.Option(help="foretell this, too: gap or move, where the tapes have it; may be repeated")
    ] = None,
    horizon: Annotated[int, typer.Option(help="events that the head `move` looks ahead")] = 20,
    jitter: Annotated[
        float | None,
        typer.Option(
            help="disturb the features' levels, for use on another instrument; 1 is much [default: 1.5 for several "
            "tapes, else 0]"
        ),
    ] = None,
) -> None:
    """Fit a small model to recorded tapes and write a checkpoint. Deterministic for a seed and a version of PyTorch."""
    import torch

    from streamattn.checkpoint import save_checkpoint
    from streamattn.tape import load_tape
    from streamattn.train import TrainOptions
    from streamattn.train import train as fit

    torch.set_num_threads(1)  # small matrices: more threads are slower, and change the order of sums
    if jitter is None:  # who trains on several instruments wants to use the model on others
        jitter = 1.5 if len(tape) > 1 else 0.0
    options = TrainOptions(
        fraction=fraction, layers=layers, width=width, window=window, first=first, epochs=epochs, mirror=mirror,
        learning_rate=learning_rate, seed=seed, heads=("next", *(head or ())), horizon=horizon, jitter=jitter,
    )  # fmt: skip
    tapes = {spec: load_tape(spec) for spec in tape}
    _check_folder(out)
    with _progress("training") as progress:
        checkpoint = fit(tapes, options, progress)
    save_checkpoint(checkpoint, out)
    bits = checkpoint.training["validation_bits"]
    size = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    text = f"wrote {out}: {size:,} parameters, {bits:.4f} bits per event on validation"
    errors.print(text, markup=False, highlight=False, soft_wrap=True)


def _check_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: expected a folder that can be written, found {path}: {error.strerror}") from None


@app.command("eval")
def evaluate(
    model: ModelOption,
    tape: TapeOption,
    json_output: JsonOption = False,
    start: Annotated[int | None, typer.Option(help="first event; default: what follows the trained part")] = None,
    stop: Annotated[int | None, typer.Option(help="event after the last; default: the tape's end")] = None,
    allow_overlap: Annotated[bool, typer.Option(help="score events that were trained on, too")] = False,
    picture: Annotated[Path | None, typer.Option(help="draw the running bits per event into this file")] = None,
) -> None:
    """Score a model on a tape through the streaming engine, beside the parallel form and an online n-gram."""
    import torch

    from streamattn.evaluate import draw_running
    from streamattn.evaluate import evaluate as score
    from streamattn.tape import load_tape

    torch.set_num_threads(1)
    checkpoint = _load(model)
    loaded = load_tape(tape)
    with contextlib.nullcontext() if json_output else _progress("scoring") as progress:
        found = score(checkpoint, loaded, start=start, stop=stop, allow_overlap=allow_overlap, progress=progress)
    if picture is not None:
        draw_running(found, picture, f"{loaded.name}: next event (lower is better)")
    if json_output:
        typer.echo(json.dumps(found.to_dict()))
    else:
        _show_score(found)


def _show_score(score: Score) -> None:
    table = Table(title=f"{score.events:,} events, {score.start} to {score.stop}", show_header=False)
    table.add_row("streaming engine", f"{score.bits_per_event:.4f} bits per event")
    table.add_row("parallel form", f"{score.parallel_bits_per_event:.4f}")
    table.add_row(f"online n-gram (order {score.ngram_order})", f"{score.ngram_online_bits:.4f}")
    table.add_row(f"static n-gram (order {score.ngram_order})", f"{score.ngram_static_bits:.4f}")
    console = Console()
    console.print(table)
    _show_classes("next event", score.classes, "online n-gram", console)
    _show_calibration("next event", score.calibration, console)
    for name, head in score.heads.items():
        _show_head(name, head, console)
    for note in score.notes:
        console.print(note, markup=False)


def _show_classes(title: str, classes: list[dict[str, Any]], rival: str, console: Console) -> None:
    table = Table(title=f"{title}: by class (* loses to the {rival})")
    for column in ("class", "events", "bits", rival, "recall", "precision"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for row in classes:
        loses = " *" if row["bits"] > row["rival_bits"] else ""
        precision = "never said" if row["precision"] is None else f"{row['precision']:.1%}"
        numbers = f"{row['count']:,}", f"{row['bits']:.3f}{loses}", f"{row['rival_bits']:.3f}", f"{row['recall']:.1%}"
        table.add_row(row["name"], *numbers, precision)
    console.print(table)


def _show_calibration(title: str, calibration: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{title}: calibration of the likeliest class, expected error {calibration['error']:.4f}")
    for column in ("stated chance", "events", "mean stated", "came true"):
        table.add_column(column, justify="right")
    for row in calibration["table"]:
        bounds = f"{row['low']:.1f} to {row['high']:.1f}"
        table.add_row(bounds, f"{row['count']:,}", f"{row['stated']:.3f}", f"{row['found']:.3f}")
    console.print(table)


def _show_head(name: str, head: dict[str, Any], console: Console) -> None:
    loss, unit = ("pinball", head["unit"]) if "pinball" in head else ("bits", f"{head['horizon']} events ahead")
    table = Table(title=f"{name} ({unit}): {head['events']:,} events", show_header=False)
    if not head["events"]:
        console.print(table)
        return
    table.add_row("streaming engine", f"{head[loss]:.4f} {loss}")
    for rival, value in head["rivals"].items():
        table.add_row(rival.replace("_", " "), f"{value:.4f}" + ("  (better)" if value < head[loss] else ""))
    if loss == "pinball":
        for row in zip(head["levels"], head["coverage"], head["level_pinball"], head["level_rival"], strict=True):
            table.add_row(f"  quantile {row[0]:.2f}", f"{row[1]:.3f} below it; {row[2]:.4f}, online {row[3]:.4f}")
    else:
        table.add_row("accuracy", f"{head['accuracy']:.1%}")
        for rival, value in head["rival_accuracy"].items():
            worse = "  (better)" if value > head["accuracy"] else ""
            table.add_row(f"  of {rival.replace('_', ' ')}", f"{value:.1%}{worse}")
    console.print(table)
    if loss == "bits":
        _show_classes(name, head["classes"], "online frequencies", console)
        _show_calibration(name, head["calibration"], console)


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with Progress(*columns, console=errors) as bar:
        task = bar.add_task(name, total=None, text="")
        yield lambda done, total, text: bar.update(task, completed=done, total=total, text=text)


# --- demo, env -------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for demo.json and demo.png")] = Path("build"),
    events: Annotated[int, typer.Option(help="events to send in all")] = 50_000,
    rate: Annotated[float, typer.Option(help="events per second in all")] = 600.0,
    tape: Annotated[str, typer.Option(help="CODEC:PATH")] = "trades:emini",
    model: Annotated[str, typer.Option(help="checkpoint folder or name of a shipped model")] = "emini",
) -> None:
    """Replay a real tape over ZeroMQ through a running engine, and score its predictions."""
    from streamattn.demo import run_demo

    _check_folder(out)
    numbers = run_demo(tape, events, rate, out, model)
    latency = numbers["latency_us"]
    table = Table(title="streamattn demo: next price move of the E-mini S&P 500", show_header=False)
    for label, value in (
        ("events", f"{numbers['events']:,} at {numbers['events_per_second']:,.0f} a second"),
        ("streams", numbers["streams"]),
        ("drops, gaps", f"{numbers['drops']}, {numbers['gaps']}"),
        ("bits per event", f"{numbers['bits_per_event']:.4f}"),
        ("online n-gram", f"{numbers['ngram_bits_per_event']:.4f}"),
        ("latency from intended send time", ""),
        ("  p50 / p99", f"{latency['p50'] / 1e3:.2f} / {latency['p99'] / 1e3:.2f} ms"),
        ("  p99.9 / max", f"{latency['p99_9'] / 1e3:.2f} / {latency['max'] / 1e3:.2f} ms"),
        ("cache bytes, start and end", f"{numbers['cache_bytes_start']:,} and {numbers['cache_bytes_end']:,}"),
    ):
        table.add_row(label, str(value))
    console = Console()
    console.print(table)
    console.print(f"numbers: {out / 'demo.json'}\npicture: {out / 'demo.png'}", markup=False, soft_wrap=True)


@app.command()
def env(json_output: JsonOption = False) -> None:
    """Print versions and devices, for bug reports."""
    import platform
    from importlib import metadata

    packages = ("streamattn", "torch", "triton", "numpy", "pyzmq", "aiomqtt", "msgspec", "msgpack")
    found: dict[str, str] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    import torch

    found["threads"] = str(torch.get_num_threads())
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if json_output:
        typer.echo(json.dumps(found))
    else:
        for name, value in found.items():
            typer.echo(f"{name:12} {value}")
