"""The codec `lobster`: NASDAQ order-book events, as LOBSTER's message and book files hold them.

`lobster:PATH` takes the zip of one LOBSTER sample, a folder that holds one message file and its book file, or a message
CSV with its book CSV beside it (`…_message_1.csv` and `…_orderbook_1.csv`). `lobster:PATH?tick=N` shows the same events
as they would look on an exchange with a tick of N hundredths of a cent: prices to buy are rounded down to it, prices to
sell up, and levels that meet are merged. A model that has seen a few such tapes beside the plain one does not mistake
one stock's ratio of spread to tick for a law. Neither file has a header. Message columns:
seconds after midnight, type, order id, size, price, direction; further ones are not read. Book columns: ask price, ask
size, bid price, bid size of each level, as they are **after** the event of the same row.

**Events.** One a message row. Its id is `(type, direction)`, one of `LOBSTER_SYMBOLS`: a limit order is submitted, cut
down (`cancel`), deleted or executed, or a hidden order is executed (`hidden`), on the sell or the buy side; `halt` for
every trading-halt message and `other` for any type that is none of these. `event_ns` counts from the date in the file's
name, as if its clock were UTC.

**Features** hold only what is known once the event has been seen: rows up to its own. None carries a price, a number of
shares or a tick size, so that a model can be used on another instrument: prices are in ticks (the greatest common
divisor of the best prices so far), sizes and pauses are set against their own running means where they have no natural
unit. Distances go through `s(x) = sign(x) log(1 + |x|)`, and everything is held within bounds, so that a strange row
says no more than an extreme one. "before" is the book of the row above. A missing side of the book counts as 1,000
ticks away.

    gap               log1p(ns since the event before)
    pace              the same less its running mean
    burst_1ms         log1p(events in the last millisecond, itself included), and in the last 100
    size              log(size) less its running mean
    round_lot         1 if the size is a multiple of 100, else 0
    spread            log(spread in ticks)
    spread_change     the same less its running mean
    behind_now        s(ticks from the order's price to the best of its side), above 0: behind it
    behind_before     s(the same to the best before): below 0 is inside the spread
    across_before     s(ticks from the order's price to the best of the other side, before)
    side              +1 for an order to buy, -1 to sell, 0 for none
    known             1 if the order named was submitted on this tape, and was still there, else 0
    gone              1 if the event took the rest of that order, else 0
    age_events        log1p(events since it was submitted), 0 if unknown
    age_time          log1p(ns since it was submitted), 0 if unknown
    imbalance         (bid size - ask size) / (their sum), at the best prices
    imbalance_before  the same before
    imbalance_deep    the same over all levels of the file
    flow              running mean of the sign of executions: whoever is hitting whom
    drift             s(ticks from the running mean of the middle price to the middle price)
    move_bid, _ask    s(ticks that the best price moved up with this event)
    queue_bid, _ask   log(size at the best price) less its running mean, which both sides share
    deep_bid, _ask    log(size at the best price / size of all levels)
    hole_bid, _ask    s(ticks from the best price to the next), 0 in a file of one level
    stood_bid, _ask   log1p(events since the best price last changed)
    young_bid, _ask   log1p(orders still there of those submitted in the last 32 events)
    odds_SYMBOL       log of the chance of SYMBOL as next event, by an interpolated Witten-Bell n-gram of order 3 that
                      has counted this tape from its first event to this one: what an instrument's own habits say
    odds_book_SYMBOL  the same, given the last symbol, what the best price of its side did, whether more than
                      a millisecond passed before it, and in which fifth `imbalance` is

`targets` has `mid`, the middle price in ticks of a cent's hundredth, NaN where a side is empty. `mirrored` exchanges
buyers and sellers. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from streamattn.errors import ConfigError
from streamattn.tape import FeatureSchema, Mirror, Tape

_VERSION = 1
_TYPES = {1: "submit", 2: "cancel", 3: "delete", 4: "execute", 5: "hidden"}
_HALT = 7
LOBSTER_SYMBOLS = (
    *(f"{name}_{side}" for name in _TYPES.values() for side in ("sell", "buy")),
    "halt",
    "other",
)
_EVEN = (
    "gap", "pace", "burst_1ms", "burst_100ms", "size", "round_lot", "spread", "spread_change", "behind_now",
    "behind_before", "across_before", "known", "gone", "age_events", "age_time",
)  # fmt: skip
_ODD = ("side", "imbalance", "imbalance_before", "imbalance_deep", "flow", "drift")  # change sign in the mirror
_PAIRS = ("move", "queue", "deep", "hole", "stood", "young")  # of bid and ask
LOBSTER_FEATURES = (
    *_EVEN,
    *_ODD,
    *(f"{name}_{side}" for name in _PAIRS for side in ("bid", "ask")),
    *(f"odds_{symbol}" for symbol in LOBSTER_SYMBOLS),
    *(f"odds_book_{symbol}" for symbol in LOBSTER_SYMBOLS),
)

_NO_PRICE = 9_999_999_999  # LOBSTER's price of a level that is not there; of the other sign for bids
_FAR = 1000.0  # ticks: as far as anything is said to be
_YOUNG = 32  # events
_NS_PER_MS = 1_000_000
_MEAN_WEIGHT = 0.01  # of the newest event in running means
_FAST_WEIGHT = 0.05  # in `flow` and `drift`
_ORDER = 3  # of the n-gram behind `odds`
_LEAST_ODDS = -7.0
_BOUND = 5.0  # of what is set against its own running mean


class Messages(NamedTuple):
    """Columns of a message file, one entry an event: [N] each."""

    time_ns: np.ndarray  # int64, since midnight
    kind: np.ndarray  # int64, LOBSTER's type
    order: np.ndarray  # int64, its id
    size: np.ndarray  # int64, shares
    price: np.ndarray  # int64, 1/100 of a cent
    side: np.ndarray  # int64, +1 to buy, -1 to sell


def lobster_tape(spec: str | Path) -> Tape:
    """Return the tape of a LOBSTER sample (see the head of this module).

    Args:
        spec: "PATH" or "PATH?tick=N".

    Raises:
        ConfigError: a missing or damaged file, message and book files that do not belong together, or a bad option.
    """
    path, mark, option = str(spec).partition("?")
    name, messages, book = _read(Path(path))
    if book is None:
        raise ConfigError(f"{path}: expected a message file and its book file, found no book file")
    date = re.search(r"_(\d{4}-\d{2}-\d{2})_", name)
    midnight = int(np.datetime64(date.group(1), "ns").astype(np.int64)) if date else 0
    if mark:
        messages, book = _coarse(messages, book, _tick_option(spec, option))
    ids = lobster_ids(messages.kind, messages.side)
    return Tape(
        name=re.sub(r"_\d+_\d+_message|\.csv$", "", name) + mark + option,
        schema=FeatureSchema(LOBSTER_SYMBOLS, LOBSTER_FEATURES, "lobster", _VERSION),
        event_ns=messages.time_ns + midnight,
        ids=ids,
        features=lobster_features(messages, book, ids),
        targets={"mid": _Best.of(book).mid},
    )


def _tick_option(spec: str | Path, option: str) -> int:
    key, _, value = option.partition("=")
    if key != "tick" or not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"lobster:{spec}: expected ?tick=N with N >= 1, found ?{option}")
    return int(value)


def _coarse(messages: Messages, book: np.ndarray, tick: int) -> tuple[Messages, np.ndarray]:
    """Return the messages and the book with prices rounded outward to multiples of `tick`, and equal levels merged."""

    def rounded(price: np.ndarray, up: np.ndarray | bool) -> np.ndarray:
        result = np.where(up, -(-price // tick), price // tick) * tick
        return np.where(np.abs(price) < _NO_PRICE, result, price)

    levels = book.reshape(len(book), -1, 4)
    merged = np.zeros_like(levels)
    rows = np.arange(len(book))[:, None] + np.zeros_like(levels[:, :, 0])
    for side, empty in ((0, _NO_PRICE), (2, -_NO_PRICE)):
        price = rounded(levels[:, :, side], side == 0)
        rank = np.cumsum(np.diff(price, axis=1, prepend=price[:, :1]) != 0, axis=1)
        merged[:, :, side] = empty
        merged[rows, rank, side] = price
        np.add.at(merged[:, :, side + 1], (rows, rank), levels[:, :, side + 1])
    shown = np.isin(messages.kind, (1, 2, 3, 4))  # a hidden order keeps its price, inside the spread
    price = np.where(shown, rounded(messages.price, messages.side < 0), messages.price)
    return messages._replace(price=price), merged.reshape(book.shape)


def order_submissions(path: str | Path) -> np.ndarray:
    """Return for each event of a LOBSTER sample the position of the submission that it names: [N] int64.

    -1 where there is none: for a submission itself, a hidden order, a halt, or an order older than the file.

    Raises:
        ConfigError: a missing or damaged message file.
    """
    messages = _read(Path(path), want_book=False)[1]
    submitted: dict[int, int] = {}
    result = np.full(len(messages.kind), -1, np.int64)
    for i, (kind, order) in enumerate(zip(messages.kind.tolist(), messages.order.tolist(), strict=True)):
        if kind == 1:
            submitted[order] = i
        elif kind in (2, 3, 4):
            result[i] = submitted.get(order, -1)
    return result


def lobster_mirror() -> Mirror:
    """Return how a tape looks with buyers and sellers exchanged."""
    swapped = {"buy": "sell", "sell": "buy", "bid": "ask", "ask": "bid"}

    def other(name: str) -> str:
        stem, _, side = name.rpartition("_")
        return f"{stem}_{swapped[side]}" if side in swapped else name

    negative = {*_ODD, "move_bid", "move_ask"}
    return Mirror(
        symbols=tuple(LOBSTER_SYMBOLS.index(other(name)) for name in LOBSTER_SYMBOLS),
        features=tuple(LOBSTER_FEATURES.index(other(name)) for name in LOBSTER_FEATURES),
        signs=tuple(-1.0 if name in negative else 1.0 for name in LOBSTER_FEATURES),
        negated_targets=("mid",),
    )


def lobster_ids(kind: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Return the id of each event in `LOBSTER_SYMBOLS`: [N] int32.

    Args:
        kind: [N] int64, LOBSTER's type.
        side: [N] int64, +1 or -1.
    """
    ids = np.full(len(kind), LOBSTER_SYMBOLS.index("other"), np.int32)
    for i, number in enumerate(_TYPES):
        for j, sign in enumerate((-1, 1)):
            ids[(kind == number) & (side == sign)] = 2 * i + j
    ids[kind == _HALT] = LOBSTER_SYMBOLS.index("halt")
    return ids


# --- features --------------------------------------------------------------------------------------------------------


class _Best(NamedTuple):
    """The best prices and sizes after each event, [N] float64 each; NaN prices and zero sizes where a side is empty."""

    ask: np.ndarray
    ask_size: np.ndarray
    bid: np.ndarray
    bid_size: np.ndarray

    @classmethod
    def of(cls, book: np.ndarray) -> _Best:
        ask, ask_size, bid, bid_size = book[:, :4].T.astype(np.float64)
        return cls(
            np.where(ask >= _NO_PRICE, np.nan, ask),
            np.where(ask >= _NO_PRICE, 0.0, ask_size),
            np.where(bid <= -_NO_PRICE, np.nan, bid),
            np.where(bid <= -_NO_PRICE, 0.0, bid_size),
        )

    @property
    def mid(self) -> np.ndarray:
        return (self.ask + self.bid) / 2

    def before(self) -> _Best:
        return _Best(*(np.concatenate((column[:1], column[:-1])) for column in self))


def lobster_features(messages: Messages, book: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the features of each event, in the order of `LOBSTER_FEATURES`: [N, d] float32.

    Args:
        messages: the events.
        book: [N, 4 x levels] int64, the book after each of them.
        ids: [N] int32, their ids.
    """
    columns = {
        **_timing(messages.time_ns),
        **_prices(messages, _Best.of(book)),
        **_depth(book, _Best.of(book)),
        **_orders(messages),
        **_odds("odds", ids, _recent_contexts(ids)),
        **_odds("odds_book", ids, _book_contexts(messages, _Best.of(book), ids)),
    }
    columns["size"] = _against_mean(np.log(np.maximum(messages.size, 1)))
    columns["round_lot"] = ((messages.size % 100 == 0) & (messages.size > 0)).astype(np.float64)
    return np.stack([columns[name] for name in LOBSTER_FEATURES], axis=1).astype(np.float32)


def _timing(time_ns: np.ndarray) -> dict[str, np.ndarray]:
    gap = np.log1p(np.diff(time_ns, prepend=time_ns[:1]).astype(np.float64))
    here = np.arange(len(time_ns))
    bursts = {
        f"burst_{ms}ms": np.log1p(here + 1 - np.searchsorted(time_ns, time_ns - ms * _NS_PER_MS)) for ms in (1, 100)
    }
    return {"gap": gap, "pace": np.clip(gap - _running_mean(gap), -16, 16), **bursts}


def _prices(messages: Messages, best: _Best) -> dict[str, np.ndarray]:
    before, tick = best.before(), _ticks(best)
    side, price = np.sign(messages.side).astype(np.float64), messages.price.astype(np.float64)
    named = np.isin(messages.kind, list(_TYPES))  # others have no price

    def distance(bid: np.ndarray, ask: np.ndarray, sign: float) -> np.ndarray:
        quote = np.where(side > 0, bid, ask)
        return np.where(named, _signed_log(sign * side * (quote - price) / tick), 0.0)

    wide = np.log(np.maximum(_bounded((best.ask - best.bid) / tick), 1.0))
    middle = np.where(np.isfinite(best.mid), best.mid, price)
    executed = np.where(np.isin(messages.kind, (4, 5)), -side, 0.0)  # the side of whoever came
    return {
        "spread": wide,
        "spread_change": _against_mean(wide),
        "behind_now": distance(best.bid, best.ask, 1.0),
        "behind_before": distance(before.bid, before.ask, 1.0),
        "across_before": distance(before.ask, before.bid, 1.0),
        "side": np.where(named, side, 0.0),
        "flow": _running_mean(executed, _FAST_WEIGHT, start=0.0),
        "drift": _signed_log((middle - _running_mean(middle, _FAST_WEIGHT)) / tick),
        "move_bid": _signed_log((best.bid - before.bid) / tick),
        "move_ask": _signed_log((best.ask - before.ask) / tick),
        "stood_bid": _stood(best.bid),
        "stood_ask": _stood(best.ask),
    }


def _ticks(best: _Best) -> np.ndarray:
    both = np.gcd(*(np.nan_to_num(price).astype(np.int64) for price in (best.ask, best.bid)))
    return np.maximum(np.gcd.accumulate(both), 1).astype(np.float64)


def _depth(book: np.ndarray, best: _Best) -> dict[str, np.ndarray]:
    levels = book.reshape(len(book), -1, 4)
    there = np.abs(levels[:, :, 0::2]) < _NO_PRICE  # [N, levels, (ask, bid)]
    deep_ask, deep_bid = np.where(there, levels[:, :, 1::2], 0).sum(1).T.astype(np.float64)
    before, tick = best.before(), _ticks(best)
    queues = np.log(np.maximum(best.bid_size, 1)), np.log(np.maximum(best.ask_size, 1))
    mean = _running_mean((queues[0] + queues[1]) / 2)
    result = {
        "imbalance": _imbalance(best.bid_size, best.ask_size),
        "imbalance_before": _imbalance(before.bid_size, before.ask_size),
        "imbalance_deep": _imbalance(deep_bid, deep_ask),
        "queue_bid": np.clip(queues[0] - mean, -_BOUND, _BOUND),
        "queue_ask": np.clip(queues[1] - mean, -_BOUND, _BOUND),
        "deep_bid": queues[0] - np.log(np.maximum(deep_bid, 1)),
        "deep_ask": queues[1] - np.log(np.maximum(deep_ask, 1)),
    }
    for name, column in (("hole_ask", 0), ("hole_bid", 2)):
        hole = np.zeros(len(book))
        if levels.shape[1] > 1:
            hole = np.abs(levels[:, 1, column] - levels[:, 0, column]) / tick
        result[name] = _signed_log(hole)
    return result


def _imbalance(bid: np.ndarray, ask: np.ndarray) -> np.ndarray:
    return (bid - ask) / np.maximum(bid + ask, 1)


def _orders(messages: Messages) -> dict[str, np.ndarray]:
    """Return what is known of the orders that the events name: a walk over the tape with the orders still there."""
    n = len(messages.kind)
    known, gone, age_events, age_time = (np.zeros(n) for _ in range(4))
    young = np.zeros((n, 2))
    there: dict[int, list[int]] = {}  # order -> position of its submission, its time, size left, 1 to buy
    submitted: list[int] = []  # by event: the order submitted, -1 for none
    count = [0, 0]  # of young orders to sell, to buy
    rows = zip(*(column.tolist() for column in messages), strict=True)
    for i, (time_ns, kind, order, size, _, side) in enumerate(rows):
        submitted.append(order if kind == 1 else -1)
        if i >= _YOUNG:
            old = there.get(submitted[i - _YOUNG])
            if old is not None and old[0] == i - _YOUNG:
                count[old[3]] -= 1
        if kind == 1:
            there[order] = [i, time_ns, size, int(side > 0)]
            count[int(side > 0)] += 1
        elif kind in (2, 3, 4) and order in there:
            entry = there[order]
            entry[2] -= size
            known[i], age_events[i], age_time[i] = 1.0, i - entry[0], time_ns - entry[1]
            if kind == 3 or entry[2] <= 0:
                gone[i] = 1.0
                del there[order]
                if i - entry[0] < _YOUNG:
                    count[entry[3]] -= 1
        young[i] = count
    return {
        "known": known,
        "gone": gone,
        "age_events": np.log1p(age_events),
        "age_time": np.log1p(age_time),
        "young_ask": np.log1p(young[:, 0]),
        "young_bid": np.log1p(young[:, 1]),
    }


def _odds(prefix: str, ids: np.ndarray, contexts: np.ndarray) -> dict[str, np.ndarray]:
    """Return log p of each symbol as the next event, from counts up to and including this one.

    The interpolated n-gram of `streamattn.ngram`, for any contexts and all symbols at once.

    Args:
        prefix: of the columns' names.
        ids: [N] int32.
        contexts: [K, N] int64, numbers of the contexts that hold after each event, from the widest to the narrowest.
    """
    size = len(LOBSTER_SYMBOLS)
    numbers = [np.unique(row, return_inverse=True)[1] for row in contexts]
    counts = [np.zeros((int(row.max()) + 1, size)) for row in numbers]
    weights = [np.zeros((len(table), 2)) for table in counts]  # events counted, distinct symbols among them
    result = np.empty((len(ids), size))
    tables = list(zip(counts, weights, strict=True))
    before: tuple[int, ...] = (0,)  # only the widest context holds before the first event
    for i, (symbol, *at) in enumerate(zip(ids.tolist(), *(row.tolist() for row in numbers), strict=True)):
        for (count, weight), row in zip(tables, before, strict=False):
            weight[row] += (1, count[row, symbol] == 0)
            count[row, symbol] += 1
        before = tuple(at)
        p = np.full(size, 1 / size)
        for (count, weight), row in zip(tables, at, strict=True):
            events, distinct = weight[row].tolist()
            if not events:
                break
            p = (count[row] + distinct * p) / (events + distinct)
        result[i] = p
    odds = np.maximum(np.log(result), _LEAST_ODDS)
    return {f"{prefix}_{name}": odds[:, i] for i, name in enumerate(LOBSTER_SYMBOLS)}


def _recent_contexts(ids: np.ndarray) -> np.ndarray:
    """Return the numbers of the last 0 … `_ORDER` symbols: [_ORDER + 1, N] int64."""
    rows = [np.zeros(len(ids), np.int64)]
    for k in range(_ORDER):
        back = np.concatenate((np.full(min(k, len(ids)), -1), ids[: max(len(ids) - k, 0)])) + 1
        rows.append(rows[-1] * (len(LOBSTER_SYMBOLS) + 1) + back)
    return np.stack(rows)


def _book_contexts(messages: Messages, best: _Best, ids: np.ndarray) -> np.ndarray:
    """Return the numbers of ever more of: symbol, what its side's best price did, a pause, imbalance: [5, N] int64."""
    before = best.before()
    moves = np.where(messages.side > 0, best.bid - before.bid, before.ask - best.ask)
    moved = np.sign(np.nan_to_num(moves)).astype(np.int64) + 1
    paused = np.diff(messages.time_ns, prepend=messages.time_ns[:1]) > _NS_PER_MS
    heavy = ((_imbalance(best.bid_size, best.ask_size) + 1) * 2.499).astype(np.int64)
    rows = [np.zeros(len(ids), np.int64)]
    for column, size in ((ids, len(LOBSTER_SYMBOLS)), (moved, 3), (paused, 2), (heavy, 5)):
        rows.append(rows[-1] * size + column)
    return np.stack(rows)


def _bounded(ticks: np.ndarray) -> np.ndarray:
    return np.clip(np.nan_to_num(ticks, nan=_FAR), -_FAR, _FAR)


def _signed_log(ticks: np.ndarray) -> np.ndarray:
    ticks = _bounded(ticks)
    return np.sign(ticks) * np.log1p(np.abs(ticks))


def _stood(price: np.ndarray) -> np.ndarray:
    changed = np.diff(np.nan_to_num(price), prepend=0.0) != 0
    here = np.arange(len(price))
    return np.log1p(here - np.maximum.accumulate(np.where(changed, here, 0)))


def _against_mean(values: np.ndarray) -> np.ndarray:
    return np.clip(values - _running_mean(values), -_BOUND, _BOUND)


def _running_mean(values: np.ndarray, weight: float = _MEAN_WEIGHT, start: float | None = None) -> np.ndarray:
    """Return the running mean up to and including each value: the first count evenly, later ones by `weight`."""
    mean = float(values[0]) if start is None else start
    result = []
    for i, value in enumerate(values.tolist()):
        mean += max(weight, 1 / (i + 1) if start is None else 0.0) * (value - mean)
        result.append(mean)
    return np.array(result)


# --- files -----------------------------------------------------------------------------------------------------------


def _read(path: Path, *, want_book: bool = True) -> tuple[str, Messages, np.ndarray | None]:
    # -> name of the message file, its columns, book [N, 4 x levels] int64 or None; checked.
    try:
        with _files(path) as (name, message_file, book_file):
            table = _table(path / name, message_file, (np.float64,) + (np.int64,) * 5)
            messages = Messages(np.round(table[0] * 1e9).astype(np.int64), *table[1:])
            book = None
            if want_book and book_file is not None:
                book = _book(path, book_file, len(table[0]))
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a LOBSTER sample, found: {error}") from None
    backward = np.flatnonzero(np.diff(messages.time_ns) < 0)
    if len(backward):
        raise ConfigError(f"{path}: {name}: line {backward[0] + 2}: expected a time not before the line above")
    return name, messages, book


@contextlib.contextmanager
def _files(path: Path) -> Iterator[tuple[str, IO[str], IO[str] | None]]:
    if path.is_dir() or path.suffix.lower() == ".csv":
        if path.is_dir():
            file = path / _only(path, [p.name for p in path.iterdir() if "_message_" in p.name])
        else:
            file = path
        book = file.with_name(file.name.replace("message", "orderbook"))
        with contextlib.ExitStack() as stack:
            message = stack.enter_context(file.open())
            there = book != file and book.is_file()
            yield file.name, message, stack.enter_context(book.open()) if there else None
        return
    with zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
        name = _only(path, [n for n in archive.namelist() if "_message_" in n])
        message = stack.enter_context(io.TextIOWrapper(archive.open(name)))
        book_name = name.replace("message", "orderbook")
        there = book_name in archive.namelist()
        book = stack.enter_context(io.TextIOWrapper(archive.open(book_name))) if there else None
        yield Path(name).name, message, book


def _only(path: Path, names: list[str]) -> str:
    if len(names) != 1:
        raise ConfigError(f"{path}: expected one message file (…_message_….csv), found {sorted(names) or 'none'}")
    return names[0]


def _table(path: Path, file: IO[str], dtypes: tuple[type, ...]) -> list[np.ndarray]:
    kind = np.dtype([(f"c{i}", dtype) for i, dtype in enumerate(dtypes)])
    rows = _load(path, file, kind, tuple(range(len(dtypes))))
    if not np.isfinite(rows["c0"]).all():
        raise ConfigError(f"{path}: expected finite times, found {rows['c0'][~np.isfinite(rows['c0'])][0]}")
    return [rows[name] for name in kind.names or ()]


def _book(path: Path, file: IO[str], rows: int) -> np.ndarray:
    book = _load(path, file, np.dtype(np.int64), None)
    book = np.atleast_2d(book)
    if book.shape[1] % 4:
        raise ConfigError(f"{path}: book file: expected four columns a level, found {book.shape[1]}")
    if len(book) != rows:
        raise ConfigError(f"{path}: book file: expected {rows} rows, as in the message file, found {len(book)}")
    return book


def _load(path: Path, file: IO[str], dtype: np.dtype, columns: tuple[int, ...] | None) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy warns of an empty file and goes on
            return np.loadtxt(file, dtype, delimiter=",", usecols=columns, ndmin=2 if columns is None else 1)
    except (ValueError, IndexError, OverflowError, UserWarning) as error:
        raise ConfigError(f"{path}: expected rows of numbers, found: {error}") from None
