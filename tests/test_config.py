"""Configuration of `streamattn run`: every key, wrong keys and types, and what wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from streamattn.config import Endpoint, PolicyConfig, RunConfig, load_config
from streamattn.errors import ConfigError
from streamattn.scheduler import Policy

WHOLE = """
model = "emini"
lanes = 3
marks = 1
in_flight = 17
threads = 2

[[source]]
url = "zmq+sub://127.0.0.1:5555"
[[source]]
url = "memory://a"

[[sink]]
url = "zmq+pub://127.0.0.1:5556?bind=1"

[policy]
queue_events = 10
overflow = "drop_oldest"
deadline_ms = 2.5
on_deadline = "expired"
chunk = 4
max_chunk = 8
step_tokens = 16
"""


def load(folder: Path, text: str | bytes) -> RunConfig:
    path = folder / "run.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(path)


def test_every_key(tmp_path: Path) -> None:
    config = load(tmp_path, WHOLE)
    assert config == RunConfig(
        model="emini",
        source=(Endpoint("zmq+sub://127.0.0.1:5555"), Endpoint("memory://a")),
        sink=(Endpoint("zmq+pub://127.0.0.1:5556?bind=1"),),
        lanes=3,
        marks=1,
        in_flight=17,
        threads=2,
        policy=PolicyConfig(10, "drop_oldest", 2.5, "expired", 4, 8, 16),
    )
    assert config.policy.deadline_ns == 2_500_000
    assert all(f'{name} = "' in WHOLE or f"{name} = " in WHOLE or f"[{name}]" in WHOLE for name in _keys())


def _keys() -> list[str]:
    return [*RunConfig.__struct_fields__, *PolicyConfig.__struct_fields__]


def test_defaults_are_the_scheduler_s(tmp_path: Path) -> None:
    config = load(tmp_path, "[policy]\n").policy
    policy = Policy()
    assert config.deadline_ns is policy.deadline_ns is None
    for name in set(PolicyConfig.__struct_fields__) - {"deadline_ms"}:
        assert getattr(config, name) == getattr(policy, name), name
    assert set(PolicyConfig.__struct_fields__) - {"deadline_ms"} == set(Policy.__slots__) - {"deadline_ns"}


@pytest.mark.parametrize(("value", "nanoseconds"), [("20", 20_000_000), ("0.0015", 1_500), ("0.1", 100_000)])
def test_deadlines_are_in_milliseconds(tmp_path: Path, value: str, nanoseconds: int) -> None:
    assert load(tmp_path, f"policy.deadline_ms = {value}").policy.deadline_ns == nanoseconds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lane = 3", "unknown key `lane`; did you mean `lanes`?"),
        ("in-flight = 3", "unknown key `in-flight`; did you mean `in_flight`?"),
        ("[policy]\nover_flow = 1", "unknown key `policy.over_flow`; did you mean `overflow`?"),
        ("[policy]\nlanes = 1", "unknown key `policy.lanes`; known are queue_events, overflow, deadline_ms"),
        ("[[source]]\nuri = 'x'", "unknown key `source.uri`; did you mean `url`?"),
        ("xyz = 1", "unknown key `xyz`; known are model, source, sink, lanes, marks, in_flight, threads, policy"),
        ("'' = 1", "unknown key ``; known are model"),
        ("[[sink]]", "missing required field `url`"),
        ("model = 3", "Expected `str | null`, got `int` - at `$.model`"),
        ("lanes = '3'", "Expected `int`, got `str` - at `$.lanes`"),
        ("lanes = true", "Expected `int`, got `bool` - at `$.lanes`"),
        ("lanes = 2.5", "got `float` - at `$.lanes`"),
        ("lanes = 0", "Expected `int` >= 1 - at `$.lanes`"),
        ("in_flight = -1", "Expected `int` >= 1 - at `$.in_flight`"),
        ("marks = -1", "Expected `int` >= 0 - at `$.marks`"),
        ("threads = 0", "Expected `int` >= 1 - at `$.threads`"),
        ("lanes = 99999999999999999999", "at `$.lanes`"),
        ("source = 'zmq'", "Expected `array`, got `str` - at `$.source`"),
        ("[source]\nurl = 'x'", "Expected `array`, got `object` - at `$.source`"),
        ("policy = 1", "at `$.policy`"),
        ("policy.overflow = 'blok'", "overflow: expected one of block, drop_oldest, conflate, reject, found 'blok'"),
        ("policy.on_deadline = 'x'", "on_deadline: expected one of late, expired, found 'x'"),
        ("policy.deadline_ms = nan", "at `$.policy.deadline_ms`"),
        ("policy.deadline_ms = inf", "at `$.policy.deadline_ms`"),
        ("policy.deadline_ms = 0", "at `$.policy.deadline_ms`"),
        ("policy.chunk = 0", "at `$.policy.chunk`"),
        ("lanes = ", "is no TOML"),
        ("[" * 100_000, "is no TOML"),
        (b"model = '\xff'", "cannot be read"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'run.toml'}: ")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(path)


def test_the_command_line_wins(tmp_path: Path) -> None:
    config = load(tmp_path, WHOLE)
    assert config.replaced() == config.replaced(None, [], None, None) == config
    changed = config.replaced("other", ["memory://x"], ["memory://y", "memory://z"], 9)
    assert (changed.model, changed.lanes) == ("other", 9)
    assert changed.source == (Endpoint("memory://x"),)
    assert changed.sink == (Endpoint("memory://y"), Endpoint("memory://z"))
    assert (changed.in_flight, changed.threads, changed.policy) == (17, 2, config.policy)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"surprise": 1}, type(changed))
    with pytest.raises(ConfigError, match=r"run: Expected `int` >= 1 - at `\$\.lanes`"):
        config.replaced(lanes=0)


@pytest.mark.parametrize(
    ("said", "missing"),
    [
        ({}, "--model, --source, --sink"),
        ({"model": "emini"}, "--source, --sink"),
        ({"model": "emini", "source": ["memory://a"]}, "--sink"),
        ({"source": ["memory://a"], "sink": ["memory://a"]}, "--model"),
    ],
)
def test_what_nobody_said_is_missing(said: dict[str, Any], missing: str) -> None:
    with pytest.raises(ConfigError, match=f"run: expected {missing} or the same in the file"):
        RunConfig().replaced(**said)


def test_the_rest_may_come_from_the_command_line(tmp_path: Path) -> None:
    config = load(tmp_path, "lanes = 5").replaced("emini", ["memory://a"], ["memory://b"])
    assert (config.model, config.lanes) == ("emini", 5)
