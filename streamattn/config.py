"""Configuration of `streamattn run`: a TOML file, typed; unknown keys are errors. Options of the command line win.

model = "DIR"                 # a checkpoint folder, or the name of a shipped model
lanes = 64
[[source]]
url = "zmq+sub://127.0.0.1:5555"
[[sink]]
url = "zmq+pub://127.0.0.1:5556?bind=1"
[policy]
overflow = "block"
deadline_ms = 20.0
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from streamattn.errors import ConfigError

_Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_ENUM = re.compile(r"Invalid enum value (.*) - at `\$\.policy\.(\w+)`")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`(?: - at `\$\.?([^`\[]*))?")


class _Strict(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    pass


class Endpoint(_Strict, frozen=True):
    """A source or sink: the URL of `docs/connectors.md`."""

    url: str


class PolicyConfig(_Strict, frozen=True):
    """`streamattn.scheduler.Policy`, with the deadline in milliseconds."""

    queue_events: _Count = 4096
    overflow: Literal["block", "drop_oldest", "conflate", "reject"] = "block"
    deadline_ms: Annotated[float, Meta(ge=1e-6, le=1e9)] | None = None
    on_deadline: Literal["late", "expired"] = "late"
    chunk: _Count = 32
    max_chunk: _Count = 256
    step_tokens: _Count = 512

    @property
    def deadline_ns(self) -> int | None:
        """The deadline in nanoseconds from arrival."""
        return None if self.deadline_ms is None else round(self.deadline_ms * 1e6)


class RunConfig(_Strict, frozen=True):
    """Everything `streamattn run` needs.

    Attributes:
        model: checkpoint folder or name of a shipped model; None if the command line is to say it.
        source, sink: likewise; at least one each in the end.
        lanes: streams held at once. marks: states held for `mark` controls, of all streams together.
        in_flight: messages under way at once. threads: of PyTorch.
    """

    model: str | None = None
    source: tuple[Endpoint, ...] = ()
    sink: tuple[Endpoint, ...] = ()
    lanes: _Count = 64
    marks: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    in_flight: _Count = 4096
    threads: Annotated[int, Meta(ge=1, le=1024)] = 1
    policy: PolicyConfig = PolicyConfig()

    def replaced(
        self,
        model: str | None = None,
        source: list[str] | None = None,
        sink: list[str] | None = None,
        lanes: int | None = None,
    ) -> RunConfig:
        """Return the configuration with what the command line says instead; None and an empty list say nothing.

        Raises:
            ConfigError: the model, sources or sinks are then still not known, or a value cannot work.
        """
        said = {
            "model": model,
            "source": [{"url": url} for url in source or ()] or None,
            "sink": [{"url": url} for url in sink or ()] or None,
            "lanes": lanes,
        }
        values = {**msgspec.to_builtins(self), **{name: value for name, value in said.items() if value is not None}}
        missing = [name for name in ("model", "source", "sink") if not values[name]]
        if missing:
            options = ", ".join(f"--{name}" for name in missing)
            raise ConfigError(f"run: expected {options} or the same in the file given by --config, found neither")
        return _convert(values, "run")


def load_config(path: str | Path) -> RunConfig:
    """Return the configuration in a TOML file.

    Raises:
        ConfigError: unreadable, no TOML, an unknown key (the nearest known one is named) or a wrong type.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: is no TOML: {error}") from None
    return _convert(values, str(path))


def _convert(values: object, name: str) -> RunConfig:
    try:
        return msgspec.convert(values, RunConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name}: {_helpful(str(error))}") from None


def _helpful(message: str) -> str:
    """Return msgspec's message, with what is known where a key is not."""
    if enum := _ENUM.search(message):
        return (
            f"{enum[2]}: expected one of {', '.join(get_args(get_type_hints(PolicyConfig)[enum[2]]))}, found {enum[1]}"
        )
    unknown = _UNKNOWN.search(message)
    if unknown is None:
        return message
    key, place = unknown[1], unknown[2] or ""
    kind = {"policy": PolicyConfig, "source": Endpoint, "sink": Endpoint}.get(place, RunConfig)
    known = kind.__struct_fields__
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"known are {', '.join(known)}"
    return f"unknown key `{f'{place}.{key}' if place else key}`; {hint}"
