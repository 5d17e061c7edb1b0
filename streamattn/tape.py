"""Tapes: recorded event streams read from files, as the token ids and features that a model takes.

`load_tape("CODEC:PATH")` returns a `Tape`; its `FeatureSchema` says what the columns mean, is stored in checkpoints,
and keeps a model from being fed with another codec's columns. The codecs are `trades`, below, `lobster` (order-book
events, see `streamattn.lobster`) and `csv` (a file with a schema of its own, see `streamattn.csv_tape`). The codec
`trades`:

**File.** CSV with a header line. Of the columns, the first whose name (case and spaces aside) is one of these is
used:

    time     time, datetime, date_time, timestamp          ISO 8601 without a zone, `2013-09-01 17:00:00.083`
    price    price, last, trade_price                       a finite number
    volume   volume, size, qty, quantity, amount            a finite number, 0 or more

Rows are trades in order of time. `trades:emini` is the tape of the package mlfinpy: 500,000 trades of the E-mini S&P
500 future.

**Events.** All trades in the same millisecond are one event, a burst. Its id is the sign of the change of the last
price since the burst before: 0 `down`, 1 `flat`, 2 `up`. `event_ns` is the time of its last trade. The first burst is
`flat`.

**Features** hold only what is known once the burst is complete, and carry no price level, so that a model can be used
on another instrument. A tick is the smallest non-zero step between successive trades of the tape so far. All
logarithms are natural, `log1p(x)` is `log(1 + x)`. A pause longer than ten minutes (a session break) counts as ten
minutes; nothing is reset, so the first move after a break is the move across it.

    gap               log1p(ms since the burst before)
    volume            log1p(volume of the burst)
    trades            log(number of trades in the burst)
    move              ticks from the last price of the burst before to the last price, signed, at most 8 either way
    range             ticks from the lowest to the highest price of the burst, at most 8
    side              sign of the last step in price up to now: +1 the last trade probably hit the ask, -1 the bid, 0
                      before any step (the tick rule: Lee and Ready, Journal of Finance 46(2), 1991)
    standing_volume   log1p(volume traded since that step, the trade that made it included)
    standing_time     log1p(ms since that step)
    drift             ticks from the running mean of the middle price to the middle price, at most 8 either way;
                      the middle is half a tick off the last price, away from its side; the mean takes in a tenth
                      of each burst

This module imports neither torch nor pandas.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from streamattn.errors import ConfigError

TRADE_SYMBOLS = ("down", "flat", "up")
TRADE_FEATURES = ("gap", "volume", "trades", "move", "range", "side", "standing_volume", "standing_time", "drift")
_TRADES_VERSION = 1

_EMINI_PACKAGE = "mlfinpy"
_EMINI_VERSION = "0.1.2"
_EMINI_FILE = "mlfinpy/dataset/data/tick_data.csv"
_EMINI_MD5 = "b24f35da945b723dc0511e770fc04f2f"

_NS_PER_MS = 1_000_000
_MAX_PAUSE_MS = 600_000  # longer pauses are session breaks
_MEAN_WEIGHT = 0.1  # of the newest burst in the running mean of `drift`
_MAX_TICKS = 8  # a larger move says no more, and would dwarf all others after normalisation

_COLUMNS = {
    "time": ("time", "datetime", "date_time", "timestamp"),
    "price": ("price", "last", "trade_price"),
    "volume": ("volume", "size", "qty", "quantity", "amount"),
}


@dataclass(frozen=True)
class FeatureSchema:
    """What the columns of a tape mean.

    Attributes:
        symbols: name of each id, in order.
        features: name of each feature column, in order.
        codec: name of the codec that makes the columns.
        version: raised whenever the codec's columns change in meaning.
    """

    symbols: tuple[str, ...]
    features: tuple[str, ...]
    codec: str
    version: int

    def to_dict(self) -> dict[str, Any]:
        """Return the schema as a plain dict for JSON."""
        return {**asdict(self), "symbols": list(self.symbols), "features": list(self.features)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the schema that `to_dict` made `data` from.

        Raises:
            ConfigError: a key is missing or unknown, or a value has the wrong type.
        """
        names = [f.name for f in fields(cls)]
        if not isinstance(data, dict) or sorted(data) != sorted(names):
            found = sorted(data) if isinstance(data, dict) else type(data).__name__
            raise ConfigError(f"feature schema: expected the keys {names}, found {found}")
        for name in ("symbols", "features"):
            if not isinstance(data[name], list | tuple) or not all(isinstance(item, str) for item in data[name]):
                raise ConfigError(f"feature schema: {name}: expected a list of names, found {data[name]!r}")
        if not isinstance(data["codec"], str):
            raise ConfigError(f"feature schema: codec: expected a name, found {data['codec']!r}")
        if not isinstance(data["version"], int) or isinstance(data["version"], bool):
            raise ConfigError(f"feature schema: version: expected an int, found {data['version']!r}")
        return cls(tuple(data["symbols"]), tuple(data["features"]), data["codec"], data["version"])

    def check_same(self, other: FeatureSchema) -> None:
        """Check that `other`, found, means the same as this schema, expected.

        Raises:
            ConfigError: they differ; the message names the first difference.
        """
        for name in ("codec", "version"):
            expected, found = getattr(self, name), getattr(other, name)
            if expected != found:
                raise ConfigError(f"feature schema: {name}: expected {expected!r}, found {found!r}")
        for name in ("symbols", "features"):
            expected, found = getattr(self, name), getattr(other, name)
            for i, (a, b) in enumerate(zip(expected, found, strict=False)):
                if a != b:
                    raise ConfigError(f"feature schema: {name}[{i}]: expected {a!r}, found {b!r}")
            if len(expected) != len(found):
                raise ConfigError(f"feature schema: {name}: expected {len(expected)}, found {len(found)}")


@dataclass(frozen=True, eq=False)
class Tape:
    """A recorded stream of N events.

    Attributes:
        name: short name, for messages and tables.
        schema: what the columns mean.
        event_ns: [N] int64, time of each event in nanoseconds since 1970, never falling.
        ids: [N] int32, index into `schema.symbols`.
        features: [N, d] float32, one column for each of `schema.features`, not yet normalised.
        targets: name -> [N] float64: series that a model may be asked to foretell, and is never fed. Known are `mid`,
            the middle price after each event; NaN where there is none.

    Raises:
        ConfigError: a column of another shape or dtype.
    """

    name: str
    schema: FeatureSchema
    event_ns: np.ndarray
    ids: np.ndarray
    features: np.ndarray
    targets: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.ids)
        expected = {
            "event_ns": ((n,), np.int64),
            "ids": ((n,), np.int32),
            "features": ((n, len(self.schema.features)), np.float32),
        }
        columns = {name: getattr(self, name) for name in expected}
        for name, column in self.targets.items():
            expected[f"targets[{name!r}]"] = (n,), np.float64
            columns[f"targets[{name!r}]"] = column
        for name, (shape, dtype) in expected.items():
            column = columns[name]
            if column.shape != shape or column.dtype != dtype:
                wanted, found = f"{list(shape)} {np.dtype(dtype)}", f"{list(column.shape)} {column.dtype}"
                raise ConfigError(f"tape {self.name}: {name}: expected {wanted}, found {found}")

    def __len__(self) -> int:
        return len(self.ids)

    def slice(self, start: int, stop: int) -> Tape:
        """Return events `start` to `stop - 1` as a tape that shares this one's memory.

        Raises:
            ConfigError: not `0 <= start <= stop <= len(self)`.
        """
        if not 0 <= start <= stop <= len(self):
            raise ConfigError(f"slice: expected 0 <= start <= stop <= {len(self)}, found {start} and {stop}")
        part = slice(start, stop)
        targets = {name: column[part] for name, column in self.targets.items()}
        return Tape(self.name, self.schema, self.event_ns[part], self.ids[part], self.features[part], targets)


def fingerprint(tape: Tape) -> str:
    """Return a hash of a tape's events: times and ids."""
    digest = hashlib.sha256(np.ascontiguousarray(tape.event_ns, "<i8").tobytes())
    digest.update(np.ascontiguousarray(tape.ids, "<i4").tobytes())
    return digest.hexdigest()


class Mirror(NamedTuple):
    """What becomes of a codec's columns when up and down, or buyers and sellers, are exchanged."""

    symbols: tuple[int, ...]  # id -> id
    features: tuple[int, ...]  # column -> the column it is taken from
    signs: tuple[float, ...]  # by column, after that
    negated_targets: tuple[str, ...] = ()


def mirrored(tape: Tape) -> Tape:
    """Return the tape with up and down exchanged: as likely a tape as the first, and another one to train on.

    Raises:
        ConfigError: the codec has no such symmetry.
    """
    make = _MIRRORS.get(tape.schema.codec)
    if make is None:
        raise ConfigError(f"mirror: expected a tape of {' or '.join(_MIRRORS)}, found one of {tape.schema.codec}")
    mirror = make()
    ids = np.array(mirror.symbols, np.int32)[tape.ids]
    features = tape.features[:, list(mirror.features)] * np.array(mirror.signs, np.float32)
    targets = {name: -x if name in mirror.negated_targets else x for name, x in tape.targets.items()}
    return Tape(f"{tape.name} mirrored", tape.schema, tape.event_ns, ids, features, targets)


def load_tape(spec: str) -> Tape:
    """Return the tape that `spec` names: "CODEC:PATH", for example "trades:ticks.csv" or "trades:emini".

    Raises:
        ConfigError: an unknown codec, a missing or damaged file, or a bad row; the message names the line.
    """
    codec, colon, path = spec.partition(":")
    if not colon or not path or codec not in _CODECS:
        known = ", ".join(f"{name}:PATH" for name in _CODECS)
        raise ConfigError(f"tape: expected {known} or trades:emini, found {spec!r}")
    return _CODECS[codec](path)


# --- codec "trades" --------------------------------------------------------------------------------------------------


def _load_trades(path: str) -> Tape:
    file = _emini_file() if path == "emini" else Path(path)
    time_ns, price, volume = _read_trades(file)
    event_ns, ids, features = trade_events(time_ns, price, volume)
    schema = FeatureSchema(TRADE_SYMBOLS, TRADE_FEATURES, "trades", _TRADES_VERSION)
    return Tape("emini" if path == "emini" else file.stem, schema, event_ns, ids, features)


def _trades_mirror() -> Mirror:
    signs = tuple(-1.0 if name in ("move", "side", "drift") else 1.0 for name in TRADE_FEATURES)
    return Mirror((2, 1, 0), tuple(range(len(TRADE_FEATURES))), signs)


def _load_lobster(path: str) -> Tape:
    from streamattn.lobster import lobster_tape  # here, as it imports this module

    return lobster_tape(path)


def _lobster_mirror() -> Mirror:
    from streamattn.lobster import lobster_mirror

    return lobster_mirror()


def _load_csv(path: str) -> Tape:
    from streamattn.csv_tape import csv_tape

    return csv_tape(path)


_CODECS: dict[str, Callable[[str], Tape]] = {"trades": _load_trades, "lobster": _load_lobster, "csv": _load_csv}
_MIRRORS: dict[str, Callable[[], Mirror]] = {"trades": _trades_mirror, "lobster": _lobster_mirror}


def _emini_file() -> Path:
    hint = f"run: pip install --no-deps {_EMINI_PACKAGE}=={_EMINI_VERSION}"
    try:
        distribution = importlib.metadata.distribution(_EMINI_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"trades:emini: expected the package {_EMINI_PACKAGE}, found none; {hint}") from None
    file = Path(str(distribution.locate_file(_EMINI_FILE)))
    if not file.is_file():
        raise ConfigError(f"trades:emini: expected {file} of {_EMINI_PACKAGE}, found none; {hint} --force-reinstall")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "md5").hexdigest()
    if found != _EMINI_MD5:
        raise ConfigError(f"trades:emini: expected md5 {_EMINI_MD5}, found {found}; {hint} --force-reinstall")
    return file


def _read_trades(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # -> time [M] int64 ns, price [M] float64, volume [M] float64; checked.
    times: list[str] = []
    prices: list[float] = []
    volumes: list[float] = []
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.reader(stream)
            header = next(rows, [])
            time_at, price_at, volume_at = (_column(file, header, name) for name in _COLUMNS)
            for row in rows:
                if len(row) != len(header):
                    raise bad_row(file, len(times), f"{len(header)} columns", str(len(row)))
                times.append(row[time_at])
                prices.append(parse_number(file, len(prices), "price", row[price_at]))
                volumes.append(parse_number(file, len(volumes), "volume", row[volume_at]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{file}: expected a readable CSV file, found: {error}") from None
    if not times:
        raise ConfigError(f"{file}: expected at least one trade, found none")
    time_ns, price, volume = parse_times(file, times), np.array(prices), np.array(volumes)
    check_rows(file, np.isfinite(price), "a finite price", price)
    check_rows(file, np.isfinite(volume) & (volume >= 0), "a volume of 0 or more", volume)
    forward = np.diff(time_ns, prepend=time_ns[:1]) >= 0
    check_rows(file, forward, "a time not before the line above", np.array(times))
    return time_ns, price, volume


def _column(file: Path, header: list[str], name: str) -> int:
    for i, title in enumerate(header):
        if title.strip().lower() in _COLUMNS[name]:
            return i
    raise ConfigError(f"{file}: line 1: expected a column {' or '.join(_COLUMNS[name])}, found {header}")


def parse_number(file: Path, row: int, name: str, text: str) -> float:
    """Return the number of a cell."""
    try:
        return float(text)
    except ValueError:
        raise bad_row(file, row, f"a number as {name}", repr(text)) from None


def bad_row(file: Path, row: int, expected: str, found: str) -> ConfigError:
    """Return the error of row `row`, counted from 0 after the header."""
    return ConfigError(f"{file}: line {row + 2}: expected {expected}, found {found}")  # line 1 is the header


def check_rows(file: Path, good: np.ndarray, expected: str, values: np.ndarray) -> None:
    """Check that `good` [N] bool holds in every row; the error names the first where it does not, and its value."""
    if not good.all():
        row = int(np.argmin(good))
        raise bad_row(file, row, expected, str(values[row]))


def parse_times(file: Path, times: list[str]) -> np.ndarray:
    """Return ISO 8601 times without a zone as nanoseconds since 1970: [N] int64."""
    expected = "a time like 2013-09-01 17:00:00.083, without a zone"
    # numpy would read "1378054800" and "today" as dates too, and wrap years that do not fit into 64 bits.
    for row, text in enumerate(times):
        if not (text[4:5] == "-" and "1700" <= text[:4] <= "2200"):
            raise bad_row(file, row, expected, repr(text))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy warns of zones and goes on
        try:
            return np.array(times, "datetime64[ns]").astype(np.int64)
        except (ValueError, UserWarning, DeprecationWarning):
            for row, text in enumerate(times):
                try:
                    np.datetime64(text, "ns")
                except (ValueError, UserWarning, DeprecationWarning):
                    raise bad_row(file, row, expected, repr(text)) from None
            raise


def trade_events(
    time_ns: np.ndarray, price: np.ndarray, volume: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the events of the codec `trades` (see the head of this module).

    Args:
        time_ns: [M] int64, nanoseconds, never falling; M >= 1.
        price: [M] float64.
        volume: [M] float64, 0 or more.

    Returns:
        event_ns [N] int64, ids [N] int32 and features [N, d] float32 in the order of `TRADE_FEATURES`.
    """
    ms = time_ns // _NS_PER_MS
    start = np.flatnonzero(np.diff(ms, prepend=ms[:1] - 1))  # first trade of each burst
    end = np.append(start[1:], len(ms)) - 1  # last one
    step = np.diff(price, prepend=price[:1])  # of each trade since the one before
    tick = np.minimum.accumulate(np.where(step != 0, np.abs(step), np.inf))[end]  # infinite before the first step
    move = np.diff(price[end], prepend=price[:1])
    height = np.maximum.reduceat(price, start) - np.minimum.reduceat(price, start)
    # The trade that made the present price, and its side; before any step, the first trade and 0.
    made = np.maximum.accumulate(np.where(step != 0, np.arange(len(step)), 0))[end]
    side = np.sign(step)[made]
    traded = np.cumsum(volume)
    middle = price[end] - price[0] - side * np.where(np.isfinite(tick), tick, 0) / 2
    features = {
        "gap": np.log1p(_pause(np.diff(ms[start], prepend=ms[:1]))),
        "volume": np.log1p(np.add.reduceat(volume, start)),
        "trades": np.log(end - start + 1),
        "move": np.clip(move / tick, -_MAX_TICKS, _MAX_TICKS),
        "range": np.minimum(height / tick, _MAX_TICKS),
        "side": side,
        "standing_volume": np.log1p(traded[end] - (traded - volume)[made]),
        "standing_time": np.log1p(_pause(ms[end] - ms[made])),
        "drift": np.clip((middle - _running_mean(middle)) / tick, -_MAX_TICKS, _MAX_TICKS),
    }
    columns = np.stack([features[name] for name in TRADE_FEATURES], axis=1).astype(np.float32)
    return time_ns[end], (np.sign(move) + 1).astype(np.int32), columns


def _pause(ms: np.ndarray) -> np.ndarray:
    return np.minimum(ms, _MAX_PAUSE_MS)


def _running_mean(values: np.ndarray) -> np.ndarray:
    mean = float(values[0])
    result = []
    for value in values.tolist():
        mean += _MEAN_WEIGHT * (value - mean)
        result.append(mean)
    return np.array(result)
