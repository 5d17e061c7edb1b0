"""The command line: a real engine process over ZeroMQ, every command, every error with its exit code."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_connectors import frames as plain_frames
from helpers_connectors import free_port
from helpers_engine import eventually, small_model

import streamattn.cli
from streamattn.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, shipped_model
from streamattn.connectors.files import FileSink
from streamattn.connectors.memory import MemorySink
from streamattn.connectors.zeromq import ZmqSink, ZmqSource
from streamattn.frame import Control, Fault, Frame, Heartbeat, Message, Reply, Result, encode
from streamattn.model import Inputs
from streamattn.tape import FeatureSchema

PATIENCE = 45.0  # seconds; a process that imports torch on a busy machine
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Run the command line in this process; return exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["streamattn", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            streamattn.cli.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return int(str(code or 0)), out, err

    threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(threads)
    gc.unfreeze()


# --- run: a process, its sockets, its end ----------------------------------------------------------------------------


class Served:
    """A `streamattn run` process whose sockets listen on ports of its own choice."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.log, self.stats = folder / "log", folder / "stats.json"
        ends = ("--source", "zmq+pull://127.0.0.1:0?bind=1", "--sink", "zmq+push://127.0.0.1:0?bind=1")
        command = [sys.executable, "-m", "streamattn", "run", *ends, "--stats-file", str(self.stats), *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)

    async def __aenter__(self) -> Served:
        await eventually(lambda: self.process.poll() is not None or "sink ready" in self.log.read_text(), PATIENCE)
        assert self.process.poll() is None, self.log.read_text()
        self.way_in, self.way_out = re.findall(r"ready: zmq.* at (tcp://\S+)", self.log.read_text())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process.wait()

    async def end(self, number: int) -> int:
        self.process.send_signal(number)
        await eventually(lambda: self.process.poll() is not None, PATIENCE)
        return self.process.returncode


def emini_frames(stream: str, count: int, seed: int) -> list[Frame]:
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, 3, count).astype(np.int32)
    features = generator.random((count, 9)).astype(np.float32)
    return [Frame(stream, 1, i, i, ids[i : i + 1], features[i : i + 1]) for i in range(count)]


def columns(frames: Sequence[Frame]) -> tuple[np.ndarray, np.ndarray]:
    ids = [frame.ids for frame in frames if frame.ids is not None]
    features = [frame.features for frame in frames if frame.features is not None]
    return np.concatenate(ids), np.concatenate(features)


@torch.inference_mode()
def emini_logits(frames: Sequence[Frame]) -> np.ndarray:
    model = load_checkpoint(shipped_model("emini")).model
    ids, features = columns(frames)
    inputs = Inputs(torch.from_numpy(ids.astype(np.int64))[None], torch.from_numpy(features)[None])
    return model(inputs, model.parallel_context(len(ids)))["next"][0].numpy()


async def test_run_serves_until_sigterm_and_its_numbers_add_up(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('model = "nonsense"\nlanes = 2\nmarks = 1\n')
    found: list[Message] = []
    data = {name: emini_frames(name, 30, seed) for seed, name in enumerate(("a", "b"))}
    async with Served(tmp_path, "--config", str(config), "--model", "emini") as served:
        async with ZmqSink("push", [served.way_in]) as producer, ZmqSource("pull", [served.way_out]) as answers:
            for pair in zip(*data.values(), strict=True):
                for frame in pair:
                    await producer.send(frame)
            await producer.send(data["a"][0])  # a duplicate
            ids, features = columns(data["a"][:1])
            await producer.send(Frame("a", 1, 30, 0, ids, features[:, :3]))
            await producer.send(Frame("c", 1, 0, 0, *columns(data["b"][:1])))  # no lane is left
            await producer.send(Heartbeat("a", 1, 30, 0))
            await producer.send(Control("a", 1, "mark", 4))
            await producer.send(Control("a", 1, "close", 5))
            async with asyncio.timeout(PATIENCE):
                async for batch in answers.frames():
                    found += [d.message for d in batch if not isinstance(d.message, Heartbeat)]
                    if Reply("a", 1, 5, 30) in found:
                        break
            assert await served.end(signal.SIGTERM) == 0, served.log.read_text()
        assert served.process.stdout is not None
        assert served.process.stdout.read() == b""  # what is for people goes to standard error
    for stream, frames in data.items():
        results = [m for m in found if isinstance(m, Result) and m.stream == stream]
        assert [r.sequence for r in results] == list(range(30))
        logits = np.concatenate([r.heads["next"] for r in results])
        np.testing.assert_allclose(logits, emini_logits(frames), rtol=0, atol=2e-5)
    faults = {m.stream: m for m in found if isinstance(m, Fault)}
    assert (faults["a"].code, faults["a"].message) == ("bad_input", "features: expected shape [1, 9], found [1, 3]")
    assert faults["c"].code == "overloaded"
    assert "all 2 lanes are in use; close a stream or raise lanes" in faults["c"].message
    assert [m for m in found if isinstance(m, Reply)] == [Reply("a", 1, 4, 0), Reply("a", 1, 5, 30)]
    assert len(found) == 60 + 2 + 2
    stats = json.loads(served.stats.read_text())
    assert stats["frames"] == 63 == stats["answered"] + sum(stats["dropped"].values())
    assert stats["dropped"] == {"duplicate": 1, "bad_input": 1, "overloaded": 1}
    assert (stats["results"], stats["events"], stats["faults"], stats["failed"]) == (60, 60, 2, [])
    assert stats["counters"]["accepted"] == stats["counters"]["answered"] == {"frames": 60, "events": 60}
    assert stats["sources"][0]["messages"] == 63 + 1 + 2
    assert stats["sinks"][0]["messages"] == 60 + 2 + 2
    assert stats["cache_bytes_start"] == stats["cache_bytes_end"] > 0
    log = served.log.read_text()
    assert "serving emini on 2 lanes" in log
    assert "bad_input: features: expected shape [1, 9], found [1, 3]" in log
    assert "Traceback" not in log
    assert "Warning" not in log


async def test_run_ends_at_ctrl_c(tmp_path: Path) -> None:
    async with Served(tmp_path, "--model", "emini") as served:
        assert await served.end(signal.SIGINT) == 0, served.log.read_text()
    assert json.loads(served.stats.read_text())["frames"] == 0


def test_run_in_this_process_from_a_recording_to_a_recording(tmp_path: Path, cli: Cli) -> None:
    frames = emini_frames("a", 20, 5)
    asyncio.run(record(tmp_path / "in.rec", frames))
    ends = ("--source", f"file://{tmp_path}/in.rec?speed=inf", "--sink", f"file://{tmp_path}/out.rec")
    code, out, _ = cli("run", "--model", shipped_model("emini"), *ends, "--lanes", 1)
    assert (code, out) == (0, "")
    sink = MemorySink.named("answers-of-the-recording")
    assert cli("replay", tmp_path / "out.rec", "--sink", "memory://answers-of-the-recording", "--speed", "inf")[0] == 0
    results = [m for m in sink.take() if isinstance(m, Result)]
    np.testing.assert_allclose(
        np.concatenate([r.heads["next"] for r in results]), emini_logits(frames), rtol=0, atol=2e-5
    )


async def record(path: Path, messages: Sequence[Message]) -> None:
    async with FileSink(path) as sink:
        for message in messages:
            await sink.send(message)


# --- run: what is wrong is said, and what to do ----------------------------------------------------------------------


def test_run_without_what_it_needs(cli: Cli) -> None:
    for arguments, missing in (
        ((), "--model, --source, --sink"),
        (("--model", "emini", "--source", "memory://a"), "--sink"),
    ):
        code, out, err = cli("run", *arguments)
        assert (code, out) == (78, "")
        assert f"error: run: expected {missing} or the same in the file given by --config" in err


def test_run_with_a_configuration_that_cannot_work(tmp_path: Path, cli: Cli) -> None:
    config = tmp_path / "run.toml"
    for text, message in (
        ("lane = 3", "unknown key `lane`; did you mean `lanes`?"),
        ("lanes = 0", "Expected `int` >= 1 - at `$.lanes`"),
        ("lanes = [", "is no TOML"),
        ("policy.chunk = 512", "chunk: expected at most max_chunk = 256, found 512"),
    ):
        config.write_text(text)
        ends = ("--model", "emini", "--source", "memory://a", "--sink", "memory://b")
        code, _, err = cli("run", "--config", config, *ends)
        assert code == 78
        assert message in err
        assert "Traceback" not in err
    code, _, err = cli("run", "--config", tmp_path / "none.toml")
    assert code == 78
    assert "none.toml: cannot be read" in err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("zmq+sub://127.0.0.1:5555?topc=a", "did you mean 'topic'?"),
        ("zmp+sub://127.0.0.1:5555", "did you mean 'zmq+sub'?"),
        ("zmq+pull://127.0.0.1:99999?bind=1", "expected a port of at most 65535"),
        ("zmq+pull://0.0.0.0:5555?bind=1", "expected a loopback address"),
        ("zmq+sub://127.0.0.1:5555?hwm=[red]", "hwm: expected a whole number, found '[red]'"),
    ],
)
def test_run_with_a_wrong_address(cli: Cli, source: str, message: str) -> None:
    code, _, err = cli("run", "--model", "emini", "--source", source, "--sink", "memory://b")
    assert code == 78
    assert message in err


def test_run_on_a_port_in_use(cli: Cli) -> None:
    port = free_port()

    async def occupy() -> tuple[int, str, str]:
        async with ZmqSource("pull", [f"tcp://127.0.0.1:{port}"], bind=True):
            ends = ("--source", f"zmq+pull://127.0.0.1:{port}?bind=1", "--sink", "memory://b")
            return await asyncio.to_thread(subprocess_run, "run", "--model", "emini", *ends)

    code, out, err = asyncio.run(occupy())
    assert (code, out) == (1, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"error: zmq+pull tcp://127.0.0.1:{port}: cannot bind")
    assert last.endswith("another process has it: stop that one or choose another port")
    assert "Traceback" not in err


def subprocess_run(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "streamattn", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return done.returncode, done.stdout, done.stderr


def test_run_with_a_wrong_checkpoint(tmp_path: Path, cli: Cli) -> None:
    ends = ("--source", "memory://a", "--sink", "memory://b")
    code, _, err = cli("run", "--model", "emin[i]", *ends)
    assert code == 78
    assert "expected a folder written by `streamattn train --out` or a shipped model (emini), found 'emin[i]'" in err
    code, _, err = cli("run", "--model", tmp_path, *ends)
    assert code == 78
    assert "model.json: cannot be read: No such file or directory; expected a folder written by" in err
    for file in shipped_model("emini").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes().replace(b"\0", b"\1"))
    code, _, err = cli("eval", "--model", tmp_path, "--tape", "trades:emini")
    assert code == 78
    assert "model.safetensors is damaged or belongs to another model.json; fetch it again" in err


def test_run_with_more_lanes_than_memory(cli: Cli) -> None:
    ends = ("--source", "memory://a", "--sink", "memory://b")
    code, _, err = cli("run", "--model", "emini", *ends, "--lanes", 2_000_000_000)
    assert code == 78
    assert re.search(r"found 2,000,000,000 rows of [\d,]+ bytes; take fewer", err)


def test_run_checks_the_statistics_file_first_and_writes_it_when_it_fails(tmp_path: Path, cli: Cli) -> None:
    ends = ("--model", "emini", "--source", f"file://{tmp_path}/in.rec?speed=inf", "--sink", f"file://{tmp_path}/o.rec")
    code, _, err = cli("run", *ends, "--stats-file", tmp_path / "no" / "stats.json")
    assert code == 78
    assert "--stats-file: expected a file that can be written" in err
    asyncio.run(record(tmp_path / "in.rec", emini_frames("a", 3, 0)))
    whole = (tmp_path / "in.rec").read_bytes()
    (tmp_path / "in.rec").write_bytes(whole + b"\xff" * 40)
    code, _, err = cli("run", *ends, "--stats-file", tmp_path / "stats.json")
    assert code == 1  # the only source has failed
    assert "damaged at byte" in err.splitlines()[-1]
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["answered"] == stats["frames"] == 3
    assert "damaged at byte" in stats["failed"][0]


def test_wrong_usage_has_the_exit_code_of_the_library(cli: Cli) -> None:
    for arguments in (("run", "--sauce", "x"), ("walk",), ("eval",), ("replay", "a.rec"), ("train", "--seed", "-1")):
        code, out, err = cli(*arguments)
        assert (code, out) == (2, "")
        assert "Usage: streamattn" in err


# --- replay ----------------------------------------------------------------------------------------------------------


def test_replay_sends_a_recording_to_every_sink(tmp_path: Path, cli: Cli) -> None:
    messages = plain_frames(50, streams=3)
    path = tmp_path / "tick#1 ?.rec"
    asyncio.run(record(path, messages))
    first, second = (MemorySink.named(f"replay{i}") for i in range(2))
    code, out, err = cli(
        *("replay", path, "--sink", "memory://replay0", "--sink", "memory://replay1", "--speed", "inf")
    )
    assert (code, out) == (0, "")
    assert "sent 50 messages" in err
    for sink in (first, second):
        assert list(map(encode, sink.take())) == list(map(encode, messages))


def test_replay_over_a_socket_waits_for_its_peer(tmp_path: Path, cli: Cli) -> None:
    messages = plain_frames(50)
    asyncio.run(record(tmp_path / "a.rec", messages))
    endpoint = f"127.0.0.1:{free_port()}"

    async def receive() -> list[Message]:
        found: list[Message] = []
        async with ZmqSource("pull", [f"tcp://{endpoint}"], bind=True) as source:
            command = ("replay", str(tmp_path / "a.rec"), "--sink", f"zmq+push://{endpoint}", "--speed", "inf")
            sending = asyncio.create_task(asyncio.to_thread(subprocess_run, *command))
            async with asyncio.timeout(PATIENCE):
                async for batch in source.frames():
                    found += [d.message for d in batch if isinstance(d.message, Frame)]
                    if len(found) == 50:
                        break
            assert (await sending)[0] == 0
        return found

    assert list(map(encode, asyncio.run(receive()))) == list(map(encode, messages))


def test_replay_of_what_is_no_recording(tmp_path: Path, cli: Cli) -> None:
    code, _, err = cli("replay", tmp_path / "none.rec", "--sink", "memory://x")
    assert code == 1
    assert "expected a recording: No such file" in err
    (tmp_path / "text").write_text("hello\n")
    code, _, err = cli("replay", tmp_path / "text", "--sink", "memory://x")
    assert code == 1
    assert "expected a recording of streamattn" in err
    for speed in ("0", "-1", "nan"):
        code, _, err = cli("replay", tmp_path / "text", "--sink", "memory://x", "--speed", speed)
        assert code == 78
        assert "speed: expected more than 0" in err
    asyncio.run(record(tmp_path / "torn", plain_frames(2)))
    (tmp_path / "torn").write_bytes((tmp_path / "torn").read_bytes()[:-1])
    code, _, err = cli("replay", tmp_path / "torn", "--sink", "memory://torn", "--speed", "inf")
    assert code == 0
    assert "sent 1 messages, dropped 1 damaged ones" in err


# --- train, eval -----------------------------------------------------------------------------------------------------


def write_trades(path: Path, seed: int, trades: int) -> str:
    """Write a CSV tape of alternating prices with some noise; return its spec."""
    generator = np.random.default_rng(seed)
    times = np.datetime64("2024-01-02T09:00:00.000") + np.cumsum(generator.integers(1, 900, trades))
    steps = np.where(generator.random(trades) < 0.8, np.arange(trades) % 2 * 2 - 1, generator.integers(-1, 2, trades))
    prices = 100 + 0.25 * np.cumsum(steps)
    volumes = generator.integers(1, 20, trades)
    rows = [f"{str(t).replace('T', ' ')},{p},{v}" for t, p, v in zip(times, prices, volumes, strict=True)]
    path.write_text("time,price,volume\n" + "\n".join(rows) + "\n")
    return f"trades:{path}"


QUICK = ("--layers", "1", "--width", "8", "--window", "4", "--first", "0", "--epochs", "2", "--seed", "3")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A tape and a model trained on it by a process."""
    folder = tmp_path_factory.mktemp("trained")
    spec = write_trades(folder / "ticks.csv", 1, 4000)
    code, out, err = subprocess_run("train", "--tape", spec, "--out", str(folder / "model"), *QUICK)
    assert (code, out) == (0, ""), err
    assert "bits per event on validation" in err
    return spec, folder / "model"


def test_training_is_deterministic_given_a_seed(trained: tuple[str, Path], tmp_path: Path, cli: Cli) -> None:
    spec, first = trained
    code, _, _ = cli("train", "--tape", spec, "--out", tmp_path / "again", *QUICK)
    assert code == 0
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (first / name).read_bytes()
    cli("train", "--tape", spec, "--out", tmp_path / "other", *QUICK[:-1], "4")
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (first / "model.safetensors").read_bytes()


def test_eval_prints_one_object(trained: tuple[str, Path], tmp_path: Path, cli: Cli) -> None:
    spec, model = trained
    code, out, err = cli("eval", "--model", model, "--tape", spec, "--json")
    assert (code, err) == (0, "")
    (line,) = out.splitlines()
    score = json.loads(line)
    bits = ("bits_per_event", "parallel_bits_per_event", "ngram_online_bits", "ngram_static_bits")
    assert {"events", *bits} <= set(score)
    assert all(0 < score[name] < 3 for name in bits)
    assert abs(score["bits_per_event"] - score["parallel_bits_per_event"]) < 1e-4
    assert score["events"] == score["stop"] - score["start"] - 1
    code, out, err = cli("eval", "--model", model, "--tape", spec)  # the same for people
    assert code == 0
    assert f"{score['bits_per_event']:.4f} bits per event" in out
    unseen = json.loads(cli("eval", "--model", model, "--tape", write_trades(tmp_path / "b.csv", 2, 600), "--json")[1])
    assert unseen["start"] == 0


def test_eval_refuses_what_was_trained_on_unless_told(trained: tuple[str, Path], cli: Cli) -> None:
    spec, model = trained
    code, out, err = cli("eval", "--model", model, "--tape", spec, "--start", 0, "--stop", 500, "--json")
    assert (code, out) == (78, "")
    assert "overlap with what the model was trained on; allow it with --allow-overlap" in err
    arguments = ("--start", 0, "--stop", 500, "--json", "--allow-overlap")
    code, out, _ = cli("eval", "--model", model, "--tape", spec, *arguments)
    assert code == 0
    assert json.loads(out)["events"] == 499


def test_train_and_eval_say_what_is_wrong(trained: tuple[str, Path], tmp_path: Path, cli: Cli) -> None:
    spec, model = trained
    (tmp_path / "file").touch()
    short = write_trades(tmp_path / "short.csv", 1, 50)
    (tmp_path / "bad.csv").write_text("time,price,volume\n2024-01-02 09:00:00,[b]x,1\n")
    other = tmp_path / "other"
    save_checkpoint(Checkpoint(small_model(), FeatureSchema(tuple("abcdefg"), ("x", "y", "z"), "other", 1)), other)
    for arguments, message in (
        (("train", "--tape", spec, "--out", tmp_path / "file"), "--out: expected a folder that can be written"),
        (("train", "--tape", short, "--out", tmp_path / "m"), "tape: expected at least 4096 events"),
        (("train", "--tape", spec, "--out", tmp_path / "m", "--fraction", 2), "fraction: expected between 0 and 1"),
        (("train", "--tape", spec, "--out", tmp_path / "m", "--window", 0), "Window.size: expected >= 1, found 0"),
        (("train", "--tape", "ticks.csv", "--out", tmp_path / "m"), "or trades:emini, found 'ticks.csv'"),
        (("eval", "--model", model, "--tape", f"trades:{tmp_path}/none.csv"), "expected a readable CSV file"),
        (
            ("eval", "--model", model, "--tape", f"trades:{tmp_path}/bad.csv"),
            "line 2: expected a number as price, found '[b]x'",
        ),
        (("eval", "--model", other, "--tape", spec), "feature schema: codec: expected 'other', found 'trades'"),
    ):
        code, out, err = cli(*arguments)
        assert (code, out) == (78, ""), err
        assert message in err


# --- env, help -------------------------------------------------------------------------------------------------------


def test_env(cli: Cli) -> None:
    code, out, _ = cli("env", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["streamattn"] == streamattn.__version__
    assert {"python", "platform", "torch", "numpy", "pyzmq", "device"} <= set(found)
    code, out, _ = cli("env")
    assert re.search(r"^torch +\d", out, re.MULTILINE)


def test_help_and_replay_do_not_import_torch(tmp_path: Path) -> None:
    asyncio.run(record(tmp_path / "a.rec", plain_frames(3)))
    script = f"""
import sys
from streamattn.cli import main
commands = [["--help"], *([name, "--help"] for name in ("run", "train", "eval", "replay", "demo", "env"))]
commands += [["run"], ["replay", "{tmp_path}/a.rec", "--sink", "memory://x", "--speed", "inf"]]
for command in commands:
    sys.argv = ["streamattn", *command]
    try:
        main()
    except SystemExit as end:
        assert end.code in ((78,) if command == ["run"] else (0, None)), (command, end.code)
    heavy = {{"torch", "triton", "transformers", "matplotlib"}} & set(sys.modules)
    assert not heavy, (command, heavy)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("run", "train", "eval", "replay", "demo", "env"):
        assert f"streamattn {name}" in done.stdout or f"{name} [OPTIONS]" in done.stdout
