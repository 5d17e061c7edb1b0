"""Transports. Each module has a source and a sink; `open_source` and `open_sink` choose one by its URL.

    zmq+sub://HOST:PORT?topic=sa/in/&hwm=1000      zmq+pub://HOST:PORT?bind=1&topic=sa/out/
    zmq+pull:///run/feed.sock?bind=1               zmq+push://HOST:PORT,HOST2:PORT2
    file:///var/tmp/ticks.rec?speed=inf            file:///var/tmp/answers.rec
    mqtt://HOST:PORT/sa/in/#?client_id=NAME        mqtt://HOST:PORT/sa/out/
    memory://ticks                                 memory://answers

The options in the query are the keyword arguments of the class, checked by name and type; `docs/connectors.md` lists
them. Secrets are never part of a URL, which ends up in logs: pass them as keyword arguments or name a file.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from streamattn.connectors.base import Decoder
from streamattn.errors import ConfigError
from streamattn.frame import Sink, Source, decode

__all__ = ["Decoder", "open_sink", "open_source"]
__version__ = "0.1.0"

_Options = dict[str, list[str]]


class _Kind(NamedTuple):
    factory: str  # module:attribute, imported when it is asked for
    address: Callable[[SplitResult, _Options], tuple[Any, ...]]  # -> the factory's positional arguments


def open_source(url: str, *, decoder: Decoder = decode, **secrets: Any) -> Source:
    """Return the source that a URL describes, not yet connected: `async with open_source(url) as source`.

    Args:
        url: scheme, address and options, see `docs/connectors.md`.
        decoder: what reads the received bytes.
        secrets: arguments of the connector that do not belong in a URL, such as `curve_secret`.

    Raises:
        ConfigError: an unknown scheme or option, or a value that cannot work; it names the nearest known one.
    """
    return _open(url, _SOURCES, {"decoder": decoder, **secrets})


def open_sink(url: str, **secrets: Any) -> Sink:
    """Return the sink that a URL describes, not yet connected: `async with open_sink(url) as sink`.

    Arguments and errors are those of `open_source`.
    """
    return _open(url, _SINKS, secrets)


def _open(url: str, kinds: dict[str, _Kind], arguments: dict[str, Any]) -> Any:
    try:
        parts = urlsplit(url, allow_fragments=False)  # "#" is a wildcard of MQTT topics
    except ValueError as error:
        raise ConfigError(f"url: expected scheme://address?option=value, found {url!r} ({error})") from None
    kind = kinds.get(parts.scheme)
    if kind is None:
        raise ConfigError(
            f"url: expected one of the schemes {', '.join(kinds)}, found {url!r}{_hint(parts.scheme, kinds)}"
        )
    options = _split_query(parts.query)
    address = kind.address(parts, options)
    factory = _load(kind.factory)
    types_of = _option_types(factory)
    for name in arguments:
        if name not in types_of:
            raise ConfigError(f"{name}: {parts.scheme} has no such argument{_hint(name, types_of)}")
    for name, values in options.items():
        if name not in types_of or name == "decoder":
            known = ", ".join(sorted(set(types_of) - {"decoder"}))
            raise ConfigError(f"{name}: {parts.scheme} has no such option, only {known}{_hint(name, types_of)}")
        arguments[name] = _convert(name, values, types_of[name])
    return factory(*address, **arguments)


def _load(name: str) -> Callable[..., Any]:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(f"streamattn.connectors.{module}")
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _hint(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


# --- options ---------------------------------------------------------------------------------------------------------


def _split_query(query: str) -> _Options:
    options: _Options = {}
    for item in filter(None, query.split("&")):
        name, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"url: expected option=value, found {item!r}")
        options.setdefault(unquote(name), []).append(unquote(value))  # "+" stays: a wildcard of MQTT topics
    return options


def _option_types(factory: Callable[..., Any]) -> dict[str, Any]:
    """Return name -> type of the keyword-only parameters: the options of a connector are written down once."""
    function = factory.__init__ if isinstance(factory, type) else factory
    hints = typing.get_type_hints(function)
    keywords = inspect.signature(function).parameters.values()
    return {p.name: hints[p.name] for p in keywords if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _convert(name: str, values: list[str], wanted: Any) -> Any:
    if isinstance(wanted, types.UnionType):
        (wanted,) = (option for option in typing.get_args(wanted) if option is not types.NoneType)
    if typing.get_origin(wanted) is tuple:
        return tuple(values)
    if len(values) > 1:
        raise ConfigError(f"{name}: expected one value, found {len(values)}")
    if wanted is bytes:
        raise ConfigError(f"{name}: expected as an argument or in a file, found in the URL, which ends up in logs")
    try:
        return _PARSERS[wanted](values[0])
    except (ValueError, KeyError):
        raise ConfigError(f"{name}: expected {_WORDS[wanted]}, found {values[0]!r}") from None


_PARSERS: dict[type, Callable[[str], Any]] = {
    bool: {"1": True, "true": True, "0": False, "false": False}.__getitem__,
    int: int,
    float: float,
    str: str,
    Path: Path,
}
_WORDS = {bool: "1 or 0", int: "a whole number", float: "a number", str: "text", Path: "a path"}


# --- addresses -------------------------------------------------------------------------------------------------------


def _zmq_address(parts: SplitResult, options: _Options) -> tuple[str, tuple[str, ...]]:
    endpoints = [f"tcp://{host}" for host in parts.netloc.split(",") if host]
    path = unquote(parts.path)
    if path not in ("", "/") and parts.netloc:
        raise ConfigError(f"url: expected host:port or ///path/of/socket, found both in {parts.geturl()!r}")
    if path not in ("", "/"):
        endpoints.append(f"ipc://{path}")
    endpoints += options.pop("endpoint", [])
    return parts.scheme.removeprefix("zmq+"), tuple(endpoints)


def _file_address(parts: SplitResult, _options: _Options) -> tuple[Path]:
    if parts.netloc or not parts.path:
        raise ConfigError(f"url: expected file:///absolute/path or file:relative/path, found {parts.geturl()!r}")
    return (Path(unquote(parts.path)),)


def _mqtt_source_address(parts: SplitResult, options: _Options) -> tuple[str, int, tuple[str, ...]]:
    topics = [unquote(parts.path[1:])] if len(parts.path) > 1 else []
    return (*_host_and_port(parts, 1883), tuple(topics + options.pop("topic", [])))


def _mqtt_sink_address(parts: SplitResult, _options: _Options) -> tuple[str, int, str]:
    return (*_host_and_port(parts, 1883), unquote(parts.path[1:]))


def _host_and_port(parts: SplitResult, default: int) -> tuple[str, int]:
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"url: expected host:port, found {parts.netloc!r} ({error})") from None
    if not host or "@" in parts.netloc:
        raise ConfigError(f"url: expected host:port, found {parts.netloc!r}")
    return host, port or default


def _memory_address(parts: SplitResult, _options: _Options) -> tuple[str]:
    if not parts.netloc or parts.path:
        raise ConfigError(f"url: expected memory://name, found {parts.geturl()!r}")
    return (parts.netloc,)


_SOURCES = {
    "zmq+sub": _Kind("zeromq:ZmqSource", _zmq_address),
    "zmq+pull": _Kind("zeromq:ZmqSource", _zmq_address),
    "file": _Kind("files:FileSource", _file_address),
    "mqtt": _Kind("mqtt:MqttSource", _mqtt_source_address),
    "memory": _Kind("memory:MemorySource.named", _memory_address),
}
_SINKS = {
    "zmq+pub": _Kind("zeromq:ZmqSink", _zmq_address),
    "zmq+push": _Kind("zeromq:ZmqSink", _zmq_address),
    "file": _Kind("files:FileSink", _file_address),
    "mqtt": _Kind("mqtt:MqttSink", _mqtt_sink_address),
    "memory": _Kind("memory:MemorySink.named", _memory_address),
}
