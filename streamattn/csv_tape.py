"""The codec `csv`: a user's own tape, a CSV file with a header line and a schema that says what its columns mean.

`csv:PATH` takes the schema from a TOML file beside the CSV, of the same name (`ticks.csv`, `ticks.toml`);
`csv:PATH?schema=FILE` from any other. It has four parts, of which `[features.…]` may be repeated or left out:

    name = "ticks"                      # of the codec, as a checkpoint knows it; default: that of the schema file

    [time]
    column = "when"
    unit = "iso"                        # iso (2013-09-01 17:00:00.083, no zone); s, ms, us, ns since 1970; default iso

    [symbol]
    column = "kind"                     # either the names of the symbols …
    names = ["buy", "sell"]
    # change = "price"                  # … or a column: the symbol is the sign of its change, down, flat or up

    [features.volume]                   # a feature `volume`
    column = "qty"                      # default: the feature's name
    transform = "log1p"                 # none, log1p (of 0 or more), diff (from the row above); default none
    clip = [0.0, 12.0]                  # bounds after the transform; default none

    [mid]                               # optional: the middle price, only ever a target, for the head `move`
    columns = ["bid", "ask"]            # one column, or two whose mean is taken

Rows are events in order of time. A first row has no change: its `diff` is 0 and its symbol `flat`. A cell that is no
finite number is an error that names its line. This module imports neither torch nor pandas.
"""

from __future__ import annotations

import csv
import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from streamattn.errors import ConfigError
from streamattn.tape import FeatureSchema, Tape, bad_row, check_rows, parse_number, parse_times

_VERSION = 1
_CHANGES = ("down", "flat", "up")
_UNITS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1000, "ns": 1}
_Name = Annotated[str, msgspec.Meta(min_length=1)]


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Time(_Strict):
    column: _Name
    unit: Literal["iso", "s", "ms", "us", "ns"] = "iso"


class _Symbol(_Strict):
    column: _Name | None = None
    names: tuple[_Name, ...] = ()
    change: _Name | None = None


class _Feature(_Strict):
    column: _Name | None = None
    transform: Literal["none", "log1p", "diff"] = "none"
    clip: tuple[float, float] | None = None


class _Mid(_Strict):
    columns: Annotated[tuple[_Name, ...], msgspec.Meta(min_length=1, max_length=2)]


class _Schema(_Strict):
    time: _Time
    symbol: _Symbol
    name: _Name | None = None
    features: dict[_Name, _Feature] = {}
    mid: _Mid | None = None


def csv_tape(path: str) -> Tape:
    """Return the tape of a CSV file with a schema (see the head of this module).

    Args:
        path: "FILE" or "FILE?schema=FILE".

    Raises:
        ConfigError: a missing or damaged file, an unknown key of the schema, or a bad row; the message names the line.
    """
    name, mark, option = path.partition("?")
    if mark and not option.startswith("schema="):
        raise ConfigError(f"csv:{path}: expected ?schema=FILE, found ?{option}")
    file = Path(name)
    schema_file = Path(option.removeprefix("schema=")) if mark else file.with_suffix(".toml")
    schema = _read_schema(schema_file)
    rows = _Rows(file)
    time_ns = rows.times(schema.time)
    symbols, ids = _symbols(rows, schema.symbol)
    columns = [_feature(rows, title, feature) for title, feature in schema.features.items()]
    features = np.stack(columns, axis=1) if columns else np.zeros((len(ids), 0))
    codec = f"csv:{schema.name or schema_file.stem}"
    targets = {}
    if schema.mid is not None:
        targets["mid"] = np.mean([rows.numbers(column) for column in schema.mid.columns], axis=0)
    meaning = FeatureSchema(symbols, tuple(schema.features), codec, _VERSION)
    return Tape(file.stem, meaning, time_ns, ids, features.astype(np.float32), targets)


# --- schema ----------------------------------------------------------------------------------------------------------


def _read_schema(file: Path) -> _Schema:
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{file}: expected a schema for the CSV file, found none ({error.strerror}); see streamattn.csv_tape"
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: expected TOML, found: {error}") from None
    _check_keys(file, "", found, _Schema)
    for part, kind in (("time", _Time), ("symbol", _Symbol), ("mid", _Mid)):
        _check_keys(file, f"{part}.", found.get(part), kind)
    features = found.get("features")
    for title, feature in features.items() if isinstance(features, dict) else ():
        _check_keys(file, f"features.{title}.", feature, _Feature)
    try:
        schema = msgspec.convert(found, _Schema)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file}: {error}") from None
    _check_schema(file, schema)
    return schema


def _check_keys(file: Path, where: str, found: Any, kind: type[msgspec.Struct]) -> None:
    known = kind.__struct_fields__
    for key in found if isinstance(found, dict) else ():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{file}: {where}{key}: expected one of {', '.join(known)}, found {key!r}{hint}")


def _check_schema(file: Path, schema: _Schema) -> None:
    symbol = schema.symbol
    if (symbol.change is None) == (symbol.column is None) or (symbol.column is None) != (not symbol.names):
        raise ConfigError(f"{file}: symbol: expected column and names, or change, found otherwise")
    if len(set(symbol.names)) < len(symbol.names):
        raise ConfigError(f"{file}: symbol.names: expected distinct names, found {list(symbol.names)}")
    for title, feature in schema.features.items():
        if feature.clip is not None and not feature.clip[0] < feature.clip[1]:
            raise ConfigError(f"{file}: features.{title}.clip: expected [low, high], found {list(feature.clip)}")


# --- rows ------------------------------------------------------------------------------------------------------------


class _Rows:
    """The cells of a CSV file, by column."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with file.open(newline="", encoding="utf-8-sig") as stream:
                reader = csv.reader(stream)
                self.header = [title.strip() for title in next(reader, [])]
                self.rows = list(reader)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{file}: expected a readable CSV file, found: {error}") from None
        if not self.rows:
            raise ConfigError(f"{file}: expected a header and at least one row, found none")
        for i, row in enumerate(self.rows):
            if len(row) != len(self.header):
                raise bad_row(file, i, f"{len(self.header)} columns", str(len(row)))

    def cells(self, column: str) -> list[str]:
        if column not in self.header:
            near = difflib.get_close_matches(column, self.header, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{self.file}: line 1: expected a column {column!r}, found {self.header}{hint}")
        at = self.header.index(column)
        return [row[at] for row in self.rows]

    def numbers(self, column: str) -> np.ndarray:
        values = np.array([parse_number(self.file, i, column, cell) for i, cell in enumerate(self.cells(column))])
        check_rows(self.file, np.isfinite(values), f"a finite {column}", values)
        return values

    def times(self, time: _Time) -> np.ndarray:
        cells = self.cells(time.column)
        time_ns = parse_times(self.file, cells) if time.unit == "iso" else self._unix(time)
        forward = np.diff(time_ns, prepend=time_ns[:1]) >= 0
        check_rows(self.file, forward, "a time not before the line above", np.array(cells))
        return time_ns

    def _unix(self, time: _Time) -> np.ndarray:
        unit, result = _UNITS[time.unit], []
        for i, cell in enumerate(self.cells(time.column)):
            whole, point, part = cell.strip().partition(".")
            value = parse_number(self.file, i, time.column, cell)
            # Whole numbers are kept exact: a float64 has no room for nanoseconds since 1970.
            exact = whole.isdecimal() and (not point or part.isdecimal())
            fraction = float(f"0.{part}") if exact and part else 0.0
            ns = int(whole) * unit + round(fraction * unit) if exact else value * unit
            if not abs(ns) < 2**63:  # or NaN
                raise bad_row(self.file, i, f"a time in {time.unit} since 1970", repr(cell))
            result.append(int(ns))
        return np.array(result, np.int64)


def _symbols(rows: _Rows, symbol: _Symbol) -> tuple[tuple[str, ...], np.ndarray]:
    if symbol.change is not None:
        values = rows.numbers(symbol.change)
        return _CHANGES, (np.sign(np.diff(values, prepend=values[:1])) + 1).astype(np.int32)
    assert symbol.column is not None
    number = {name: i for i, name in enumerate(symbol.names)}
    ids = np.empty(len(rows.rows), np.int32)
    for i, cell in enumerate(rows.cells(symbol.column)):
        if cell not in number:
            raise bad_row(rows.file, i, f"{symbol.column} to be one of {', '.join(symbol.names)}", repr(cell))
        ids[i] = number[cell]
    return symbol.names, ids


def _feature(rows: _Rows, title: str, feature: _Feature) -> np.ndarray:
    values = rows.numbers(feature.column or title)
    if feature.transform == "log1p":
        check_rows(rows.file, values >= 0, f"{feature.column or title} of 0 or more", values)
        values = np.log1p(values)
    elif feature.transform == "diff":
        values = np.diff(values, prepend=values[:1])
    return values if feature.clip is None else np.clip(values, *feature.clip)
