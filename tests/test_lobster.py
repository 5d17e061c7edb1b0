"""The codec `lobster`: events and features by hand, nothing of the future, buyers and sellers exchanged, bad files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from streamattn.errors import ConfigError
from streamattn.lobster import (
    LOBSTER_FEATURES,
    LOBSTER_SYMBOLS,
    Messages,
    _read,
    lobster_features,
    lobster_ids,
    lobster_tape,
    order_submissions,
)
from streamattn.ngram import NGram
from streamattn.tape import FeatureSchema, Tape, load_tape, mirrored

MARKET = Path(__file__).parents[2] / "shared" / "data" / "market"
GOOG = MARKET / "LOBSTER_SampleFile_GOOG_2012-06-21_1.zip"
needs_data = pytest.mark.skipif(not GOOG.is_file(), reason=f"no {GOOG.name}: LOBSTER samples may not be redistributed")
NONE = 9_999_999_999


def made_up(seed: int, events: int, levels: int = 2) -> tuple[Messages, np.ndarray]:
    """Return messages and a book of the right form, and without any sense."""
    rng = np.random.default_rng(seed)
    kind = rng.choice([1, 1, 1, 2, 3, 3, 4, 5, 7, 6], events)
    order = np.where(kind == 5, 0, rng.integers(1, 60, events))
    side = np.where(kind == 7, -1, rng.choice([-1, 1], events))
    price = np.where(kind == 7, -1, 100 * rng.integers(9_950, 10_050, events))
    size = np.where(kind == 7, 0, rng.integers(1, 400, events))
    messages = Messages(rng.integers(0, 10**9, events).cumsum(), kind, order, size, price, side)
    mid = 100 * (10_000 + rng.integers(-1, 2, events).cumsum())
    book = np.empty((events, levels, 4), np.int64)
    for level in range(levels):
        book[:, level, 0] = mid + 100 * (1 + 2 * level) + 100 * rng.integers(0, 2, events)
        book[:, level, 2] = mid - 100 * (1 + 2 * level) - 100 * rng.integers(0, 2, events)
        book[:, level, 1::2] = rng.integers(1, 500, (events, 2))
    book[rng.random(events) < 0.05, -1] = NONE, 0, -NONE, 0  # a level that is not there
    return messages, book.reshape(events, -1)


def features_of(messages: Messages, book: np.ndarray) -> np.ndarray:
    return lobster_features(messages, book, lobster_ids(messages.kind, messages.side))


def write(folder: Path, messages: Messages, book: np.ndarray) -> Path:
    rows = [f"{row[0] / 1e9:.9f},{','.join(str(int(x)) for x in row[1:])}" for row in zip(*messages, strict=True)]
    file = folder / "ABC_2020-01-02_34200000_57600000_message_2.csv"
    file.write_text("\n".join(rows) + "\n")
    lines = "\n".join(",".join(map(str, row)) for row in book.tolist())
    file.with_name(file.name.replace("message", "orderbook")).write_text(lines + "\n")
    return file


# --- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2])
def test_no_input_depends_on_the_next_event(levels: int) -> None:
    messages, book = made_up(0, 300, levels)
    whole = features_of(messages, book)
    for t in (0, 1, 2, 31, 32, 33, 150, 298):
        cut = features_of(Messages(*(column[: t + 1] for column in messages)), book[: t + 1])
        np.testing.assert_array_equal(cut, whole[: t + 1], err_msg=f"the tape cut after event {t}")
    other, other_book = made_up(1, 300, levels)
    for t in (0, 1, 40, 150):
        later = other.time_ns + messages.time_ns[t]
        columns = [np.concatenate((a[: t + 1], b[t + 1 :])) for a, b in zip(messages, other, strict=True)]
        columns[0] = np.concatenate((messages.time_ns[: t + 1], later[t + 1 :]))
        changed = features_of(Messages(*columns), np.concatenate((book[: t + 1], other_book[t + 1 :])))
        np.testing.assert_array_equal(changed[: t + 1], whole[: t + 1], err_msg=f"another future after event {t}")
        assert not np.array_equal(changed[t + 1], whole[t + 1])


def test_no_input_holds_a_price_level_a_size_or_a_tick() -> None:
    messages, book = made_up(2, 400)
    plain = features_of(messages, book)
    priced = messages._replace(price=np.where(messages.kind == 7, messages.price, messages.price * 5))
    scaled = book.reshape(len(book), -1, 4).copy()
    scaled[:, :, ::2] *= np.where(np.abs(scaled[:, :, ::2]) < NONE, 5, 1)  # five times the tick, and the price
    moved = features_of(priced, scaled.reshape(book.shape))
    np.testing.assert_allclose(moved, plain, rtol=0, atol=1e-6)
    shifted = book.reshape(len(book), -1, 4).copy()
    shifted[:, :, ::2] += np.where(np.abs(shifted[:, :, ::2]) < NONE, 2_772_000, 0)
    raised = messages._replace(price=np.where(messages.kind == 7, messages.price, messages.price + 2_772_000))
    # The sum is a multiple of every spread here, so that the common divisors stay.
    raised_features = features_of(raised, shifted.reshape(book.shape))
    np.testing.assert_allclose(raised_features, plain, rtol=0, atol=1e-6)


def test_features_of_a_few_events_by_hand() -> None:
    rows = [  # time ns, type, order, size, price, side; ask, size, bid, size
        ((0, 1, 7, 100, 999_800, 1), (1_000_200, 30, 999_800, 100)),
        ((5, 1, 8, 50, 999_900, 1), (1_000_200, 30, 999_900, 50)),  # one tick inside the spread of four
        ((9, 4, 8, 20, 999_900, 1), (1_000_200, 30, 999_900, 30)),
        ((9, 3, 8, 30, 999_900, 1), (1_000_200, 30, 999_800, 100)),  # the best bid falls back
        ((9, 2, 3, 10, 1_000_300, -1), (1_000_200, 30, 999_800, 100)),  # an order from before the file
    ]
    messages = Messages(*(np.array(column) for column in zip(*(m for m, _ in rows), strict=True)))
    found = dict(zip(LOBSTER_FEATURES, features_of(messages, np.array([b for _, b in rows])).T, strict=True))
    log, log1p = np.log, np.log1p
    expected = {
        "gap": log1p([0, 5, 4, 0, 0]),
        "burst_1ms": log1p([1, 2, 3, 4, 5]),
        "round_lot": [1, 0, 0, 0, 0],
        "spread": log([2, 3, 3, 4, 4]),  # the first two prices have 200 in common, later ones 100
        "behind_now": [0, 0, 0, log1p(1) * -1, log1p(1)],
        "behind_before": [0, -log1p(1), 0, 0, log1p(1)],
        "across_before": [log1p(2), log1p(3), log1p(3), log1p(3), log1p(5)],
        "side": [1, 1, 1, 1, -1],
        "known": [0, 0, 1, 1, 0],
        "gone": [0, 0, 0, 1, 0],
        "age_events": log1p([0, 0, 1, 2, 0]),
        "age_time": log1p([0, 0, 4, 4, 0]),
        "move_bid": [0, log1p(1), 0, -log1p(1), 0],
        "move_ask": [0, 0, 0, 0, 0],
        "young_bid": log1p([1, 2, 2, 1, 1]),
        "stood_bid": log1p([0, 0, 1, 0, 1]),
        "stood_ask": log1p([0, 1, 2, 3, 4]),
    }
    imbalance = [70 / 130, 20 / 80, 0, 70 / 130, 70 / 130]
    expected["imbalance"], expected["imbalance_before"] = imbalance, imbalance[:1] + imbalance[:-1]
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-6, err_msg=name)


def test_the_odds_are_those_of_an_online_ngram() -> None:
    messages, book = made_up(3, 250)
    ids = lobster_ids(messages.kind, messages.side)
    first = LOBSTER_FEATURES.index("odds_submit_sell")
    found = lobster_features(messages, book, ids)[:, first : first + len(LOBSTER_SYMBOLS)]
    rival, history = NGram(len(LOBSTER_SYMBOLS), 3), []
    for i, symbol in enumerate(ids.tolist()):
        rival.update(history, symbol)
        history.append(symbol)
        wanted = np.log(rival.probabilities(history))
        np.testing.assert_allclose(found[i], np.maximum(wanted, -7), rtol=0, atol=1e-5, err_msg=f"event {i}")


def test_everything_stays_finite_and_in_bounds() -> None:
    messages, book = made_up(4, 500)
    levels = book.reshape(500, -1, 4)
    levels[100:120, :, :2] = NONE, 0  # nobody sells
    levels[110:130, :, 2:] = -NONE, 0  # and nobody buys
    wild = messages._replace(price=messages.price * np.random.default_rng(0).choice([1, 1000], 500))
    features = features_of(wild, book)
    assert np.isfinite(features).all()
    assert np.abs(features).max() < 50


def test_the_mirror_exchanges_buyers_and_sellers() -> None:
    messages, book = made_up(5, 300)
    ordinary = ~np.isin(messages.kind, (6, 7))  # others have no side that could change
    messages = Messages(*(column[ordinary] for column in messages))
    book = book[ordinary]
    swapped = messages._replace(side=-messages.side, price=2_000_000 - messages.price)
    levels = book.reshape(len(book), -1, 4)[:, :, [2, 3, 0, 1]].copy()
    prices = levels[:, :, ::2]
    levels[:, :, ::2] = np.where(np.abs(prices) < NONE, 2_000_000 - prices, -prices)
    schema = lobster_tape_of(messages, book).schema
    image = mirrored(lobster_tape_of(messages, book))
    wanted = features_of(swapped, levels.reshape(book.shape))
    assert image.schema == schema
    np.testing.assert_array_equal(image.ids, lobster_ids(swapped.kind, swapped.side))
    for i, name in enumerate(LOBSTER_FEATURES):
        np.testing.assert_allclose(image.features[:, i], wanted[:, i], rtol=0, atol=1e-5, err_msg=name)
    back = mirrored(image)
    np.testing.assert_array_equal(back.features, lobster_tape_of(messages, book).features)


def lobster_tape_of(messages: Messages, book: np.ndarray) -> Tape:
    ids = lobster_ids(messages.kind, messages.side)
    schema = FeatureSchema(LOBSTER_SYMBOLS, LOBSTER_FEATURES, "lobster", 1)
    return Tape("made up", schema, messages.time_ns, ids, lobster_features(messages, book, ids))


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_zip_a_folder_and_a_message_file_are_the_same_tape(tmp_path: Path) -> None:
    messages, book = made_up(6, 80)
    file = write(tmp_path, messages, book)
    archive = tmp_path / "sample.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for part in tmp_path.glob("*.csv"):
            target.write(part, part.name)
    tapes = [load_tape(f"lobster:{path}") for path in (file, tmp_path, archive)]
    assert {tape.name for tape in tapes} == {"ABC_2020-01-02_2"}
    for tape in tapes:
        np.testing.assert_array_equal(tape.features, features_of(messages, book))
        np.testing.assert_array_equal(tape.ids, lobster_ids(messages.kind, messages.side))
    midnight = int(np.datetime64("2020-01-02", "ns").astype(np.int64))
    np.testing.assert_array_equal(tapes[0].event_ns, messages.time_ns + midnight)  # to the nanosecond
    best = book[:, [0, 2]]
    np.testing.assert_array_equal(tapes[0].targets["mid"], best.mean(1))


def test_a_coarser_tick_rounds_outward_and_merges_levels(tmp_path: Path) -> None:
    messages = Messages(*(np.array([x]) for x in (0, 1, 5, 10, 999_900, 1)))
    book = np.array([[1_000_100, 1, 999_900, 2, 1_000_400, 4, 999_800, 8, 1_000_600, 16, 999_400, 32]])
    file = write(tmp_path, messages, book)
    coarse = load_tape(f"lobster:{file}?tick=500")
    assert coarse.name == "ABC_2020-01-02_2?tick=500"
    merged = np.array([[1_000_500, 5, 999_500, 10, 1_001_000, 16, 999_000, 32, NONE, 0, -NONE, 0]])
    wanted = features_of(messages._replace(price=np.array([999_500])), merged)
    np.testing.assert_array_equal(coarse.features, wanted)
    np.testing.assert_array_equal(load_tape(f"lobster:{file}?tick=100").features, features_of(messages, book))
    for bad in ("?tick=0", "?tick=x", "?grid=5", "?"):
        with pytest.raises(ConfigError, match=r"expected \?tick=N"):
            load_tape(f"lobster:{file}{bad}")


def test_the_submission_that_an_event_names(tmp_path: Path) -> None:
    kind = [1, 1, 2, 5, 4, 3, 3, 7, 1, 4]
    order = [4, 5, 4, 0, 5, 4, 9, 0, 4, 4]
    n = len(kind)
    messages = Messages(np.arange(n), np.array(kind), np.array(order), *(np.ones((3, n), np.int64)))
    file = write(tmp_path, messages, np.ones((n, 4), np.int64))
    assert order_submissions(file).tolist() == [-1, -1, 0, -1, 1, 0, -1, -1, -1, 8]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda m, b: b.unlink(), "expected a message file and its book file, found no book file"),
        (lambda m, b: b.write_text("1,2,3,4\n"), "book file: expected 20 rows, as in the message file, found 1"),
        (lambda m, b: b.write_text("1,2,3\n" * 20), "book file: expected four columns a level, found 3"),
        (lambda m, b: m.write_text("1.0,1,2,3,x,1\n"), "expected rows of numbers, found"),
        (lambda m, b: m.write_text("1.0,1,2,3\n"), "expected rows of numbers, found"),
        (lambda m, b: m.write_text("nan,1,2,3,4,1\n"), "expected finite times, found nan"),
        (lambda m, b: m.write_text("2,1,2,3,4,1\n" + "1,1,2,3,4,1\n" * 19), "line 2: expected a time not before"),
        (lambda m, b: m.write_text(""), "expected rows of numbers, found"),
        (lambda m, b: m.unlink(), "expected a LOBSTER sample, found"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage, says: str) -> None:
    file = write(tmp_path, *made_up(7, 20))
    damage(file, file.with_name(file.name.replace("message", "orderbook")))
    with pytest.raises(ConfigError, match=says):
        lobster_tape(file)


def test_a_folder_or_zip_without_one_message_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one message file"):
        lobster_tape(tmp_path)
    bad = tmp_path / "bad.zip"
    bad.write_bytes(b"no zip")
    with pytest.raises(ConfigError, match="expected a LOBSTER sample"):
        lobster_tape(bad)
    with pytest.raises(ConfigError, match="expected a LOBSTER sample"):
        lobster_tape(tmp_path / "none.zip")


# --- real files ------------------------------------------------------------------------------------------------------


@needs_data
def test_the_real_day_has_the_facts_that_are_known_of_it() -> None:
    tape = load_tape(f"lobster:{GOOG}")
    assert len(tape) == 49_482
    assert (np.diff(tape.event_ns) >= 0).all()
    assert np.isfinite(tape.features).all()
    named = order_submissions(GOOG)
    cut = np.isin(tape.ids, [i for i, name in enumerate(LOBSTER_SYMBOLS) if name.startswith(("submit", "hidden"))])
    assert (named[cut] == -1).all()
    known = tape.features[:, LOBSTER_FEATURES.index("known")] == 1
    assert (named[known] >= 0).all()


@needs_data
@pytest.mark.parametrize(
    ("sample", "events", "shares"),
    [("GOOG_2012-06-21_10", 147_916, (33, 62, 87, 94)), ("AMZN_2012-06-21_5", 155_935, (38, 67, 86, 89))],
)
def test_how_long_real_orders_live(sample: str, events: int, shares: tuple[int, ...]) -> None:
    path = MARKET / f"LOBSTER_SampleFile_{sample}.zip"
    named, kind = order_submissions(path), _read(path, want_book=False)[1].kind
    assert len(named) == len(kind) == events
    age = np.arange(events) - named
    found = [round(100 * ((named >= 0) & (age < w))[np.isin(kind, (3, 4))].mean()) for w in (8, 32, 128, 512)]
    assert tuple(found) == shares
