"""Configuration of `streamattn run`: a TOML file, typed; unknown keys are errors.

model = "DIR"                 # a checkpoint folder, or the name of a shipped model
lanes = 64
[[source]]
url = "zmq+sub://127.0.0.1:5555"
[[sink]]
url = "zmq+pub://127.0.0.1:5556?bind=1"
[policy]
overflow = "block"
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from streamattn.errors import ConfigError


class _Strict(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    pass


class Endpoint(_Strict):
    """A source or sink: the URL of `docs/connectors.md`."""

    url: str


class PolicyConfig(_Strict):
    """`streamattn.scheduler.Policy`, with the deadline in milliseconds."""

    queue_events: int = 4096
    overflow: Literal["block", "drop_oldest", "conflate", "reject"] = "block"
    deadline_ms: float | None = None
    on_deadline: Literal["late", "expired"] = "late"
    chunk: int = 32
    max_chunk: int = 256
    step_tokens: int = 512


class RunConfig(_Strict):
    """Everything `streamattn run` needs.

    Attributes:
        model: checkpoint folder or name of a shipped model.
        source, sink: at least one each.
        lanes: streams held at once. in_flight: frames under way at once. threads: of PyTorch.
    """

    model: str
    source: list[Endpoint]
    sink: list[Endpoint]
    lanes: int = 64
    in_flight: int = 4096
    threads: int = 1
    policy: PolicyConfig = PolicyConfig()


def load_config(path: str | Path) -> RunConfig:
    """Return the configuration in a TOML file.

    Raises:
        ConfigError: unreadable, no TOML, an unknown key (the nearest known one is named) or a wrong type.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        return msgspec.convert(tomllib.loads(text), RunConfig)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is no TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_helpful(str(error))}") from None


def _helpful(message: str) -> str:
    unknown = re.search(r"unknown field `(\w+)`", message)
    if unknown is None:
        return message
    known = [name for kind in (RunConfig, PolicyConfig, Endpoint) for name in kind.__struct_fields__]
    nearest = difflib.get_close_matches(unknown[1], known, n=1, cutoff=0.5)
    return f"{message}; " + (
        f"did you mean `{nearest[0]}`?" if nearest else f"known are {', '.join(sorted(set(known)))}"
    )
