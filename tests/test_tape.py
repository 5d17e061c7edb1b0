import dataclasses
import hashlib
import importlib.metadata
from pathlib import Path

import numpy as np
import pytest

from streamattn import tape as tape_module
from streamattn.errors import ConfigError
from streamattn.tape import TRADE_FEATURES, TRADE_SYMBOLS, FeatureSchema, Tape, load_tape, mirrored, trade_events

MS = 1_000_000
SCHEMA = FeatureSchema(("a", "b"), ("x", "y", "z"), "trades", 1)


def write(folder: Path, *rows: str, header: str = "time,price,volume") -> str:
    file = folder / "tape.csv"
    file.write_text("\n".join([header, *rows]) + "\n")
    return f"trades:{file}"


def row(ms: int, price: float, volume: float) -> str:
    return f"{np.datetime64(1378054800000 + ms, 'ms')},{price},{volume}"


def random_trades(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    time_ns = 1378054800_000 * MS + np.cumsum(rng.integers(0, 3, n)) * MS
    price = 1600 + 0.25 * np.cumsum(rng.choice([-2, -1, 0, 0, 0, 1, 2], n))
    return time_ns, price, rng.integers(1, 50, n).astype(float)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_events_of_a_small_tape_by_hand(tmp_path: Path) -> None:
    spec = write(
        tmp_path,
        row(0, 100.0, 3),
        row(0, 100.0, 1),  # burst 0: two trades
        row(5, 100.5, 2),  # burst 1: a tick of 0.5, up
        row(5, 101.0, 1),
        row(6, 100.5, 7),  # burst 2: one tick down
        row(16, 100.5, 1),  # burst 3: flat
        row(16, 100.25, 1),  # from here on a tick is 0.25
        row(16, 100.5, 4),
    )
    tape = load_tape(spec)
    assert tape.name == "tape"
    assert tape.schema == FeatureSchema(TRADE_SYMBOLS, TRADE_FEATURES, "trades", 1)
    assert [TRADE_SYMBOLS[i] for i in tape.ids] == ["flat", "up", "down", "flat"]
    assert (tape.event_ns - tape.event_ns[0]).tolist() == [0, 5 * MS, 6 * MS, 16 * MS]
    log1p = np.log1p
    expected = {
        "gap": log1p([0, 5, 1, 10]),
        "volume": log1p([4, 3, 7, 6]),
        "trades": np.log([2, 2, 1, 3]),
        "move": [0, 2, -1, 0],
        "range": [0, 1, 0, 1],
        "side": [0, 1, -1, 1],
        "standing_volume": log1p([4, 1, 7, 4]),
        "standing_time": log1p([0, 0, 0, 0]),
        # Middles 0, 0.75, 0.75, 0.375; means 0, 0.075, 0.1425, 0.16575.
        "drift": [0, 1.35, 1.215, 0.837],
    }
    assert tuple(expected) == TRADE_FEATURES
    for name, values in expected.items():
        np.testing.assert_allclose(tape.features[:, TRADE_FEATURES.index(name)], values, rtol=1e-6, err_msg=name)


def test_standing_time_and_volume_run_on_over_flat_bursts(tmp_path: Path) -> None:
    tape = load_tape(write(tmp_path, row(0, 10, 1), row(1, 11, 2), row(4, 11, 3), row(9, 11, 4)))
    columns = dict(zip(TRADE_FEATURES, tape.features.T, strict=True))
    np.testing.assert_allclose(columns["standing_time"], np.log1p([0, 0, 3, 8]), rtol=1e-6)
    np.testing.assert_allclose(columns["standing_volume"], np.log1p([1, 2, 5, 9]), rtol=1e-6)


def test_a_session_break_counts_as_ten_minutes(tmp_path: Path) -> None:
    tape = load_tape(write(tmp_path, row(0, 10, 1), row(1, 11, 2), row(30_000_000, 12, 3)))
    assert tape.features[2, 0] == np.float32(np.log1p(600_000))
    assert tape.ids.tolist() == [1, 2, 2]


def test_a_wild_move_is_held_at_eight_ticks(tmp_path: Path) -> None:
    tape = load_tape(write(tmp_path, row(0, 10, 1), row(1, 11, 2), row(2, 500, 3), row(3, 11, 3)))
    assert tape.features[:, TRADE_FEATURES.index("move")].tolist() == [0, 1, 8, -8]


@pytest.mark.parametrize("header", ["DateTime,Price,Volume", "timestamp, last ,QTY", "Time,trade_price,Amount"])
def test_common_header_names(tmp_path: Path, header: str) -> None:
    assert len(load_tape(write(tmp_path, row(0, 10, 1), row(1, 11, 2), header=header))) == 2


def test_column_order_and_further_columns_do_not_matter(tmp_path: Path) -> None:
    stamp = "2020-01-01T00:00:00.000000001"
    tape = load_tape(write(tmp_path, f"X,5,2.5,{stamp}", header="venue,size,price,time"))
    assert tape.event_ns.tolist() == [1577836800_000_000_001]
    assert tape.features[0, 1] == np.float32(np.log1p(5))


GOOD = row(10, 100.0, 1)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (row(11, 100.0, 1).replace("100.0", "abc"), "line 3: expected a number as price, found 'abc'"),
        ("2013-09-01 17:00:01,100.0,", "line 3: expected a number as volume, found ''"),
        ("2013-09-01 17:00:01,nan,1", "line 3: expected a finite price, found nan"),
        ("2013-09-01 17:00:01,1e400,1", "line 3: expected a finite price, found inf"),
        (row(11, 100.0, -1), "line 3: expected a volume of 0 or more, found -1.0"),
        (row(9, 100.0, 1), "line 3: expected a time not before the line above"),
        ("2013-09-01 17:00,100.0", "line 3: expected 3 columns, found 2"),
        ("", "line 3: expected 3 columns, found 0"),
        ("yesterday,100.0,1", "line 3: expected a time like"),
        ("1378054801,100.0,1", "line 3: expected a time like"),
        ("2013-13-01 17:00:01,100.0,1", "line 3: expected a time like"),
        ("2013-09-01 17:00:01Z,100.0,1", "line 3: expected a time like"),
        ("9999-09-01 17:00:01,100.0,1", "line 3: expected a time like"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, bad: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_tape(write(tmp_path, GOOD, bad, row(12, 100.0, 1)))
    assert says in str(caught.value)
    assert "tape.csv" in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a readable CSV file"):
        load_tape(f"trades:{tmp_path / 'absent.csv'}")
    with pytest.raises(ConfigError, match="expected at least one trade, found none"):
        load_tape(write(tmp_path))
    with pytest.raises(ConfigError, match="line 1: expected a column volume or size"):
        load_tape(write(tmp_path, GOOD, header="time,price,side"))
    (tmp_path / "empty.csv").write_bytes(b"")
    with pytest.raises(ConfigError, match="line 1: expected a column time"):
        load_tape(f"trades:{tmp_path / 'empty.csv'}")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="expected a readable CSV file"):
        load_tape(f"trades:{tmp_path / 'binary.csv'}")


@pytest.mark.parametrize("spec", ["ticks.csv", "trades:", "order:x.csv", ""])
def test_unknown_specs(spec: str) -> None:
    with pytest.raises(ConfigError, match="tape: expected trades:PATH"):
        load_tape(spec)


# --- causality -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_no_input_depends_on_a_later_burst(seed: int) -> None:
    rng = np.random.default_rng(seed)
    time_ns, price, volume = random_trades(rng, 120)
    event_ns, ids, features = trade_events(time_ns, price, volume)
    cut = int(rng.integers(0, len(ids) - 1))  # the last burst that is kept
    kept = int(np.searchsorted(time_ns, event_ns[cut], side="right"))
    other_time, other_price, other_volume = random_trades(rng, 80)
    other_time += time_ns[kept - 1] + MS - other_time[0]
    other_price = other_price / 16 + 7  # another level and a smaller tick
    for end in (0, len(other_time)):  # the future missing, the future another
        changed = trade_events(
            np.append(time_ns[:kept], other_time[:end]),
            np.append(price[:kept], other_price[:end]),
            np.append(volume[:kept], 3 * other_volume[:end]),
        )
        for before, after in zip((event_ns, ids, features), changed, strict=True):
            np.testing.assert_array_equal(before[: cut + 1], after[: cut + 1])


def test_a_price_level_does_not_matter() -> None:
    time_ns, price, volume = random_trades(np.random.default_rng(1), 200)
    plain = trade_events(time_ns, price, volume)
    scaled = trade_events(time_ns, price * 4 + 4096, volume)  # exact in binary
    for a, b in zip(plain, scaled, strict=True):
        np.testing.assert_array_equal(a, b)


# --- Tape and FeatureSchema ------------------------------------------------------------------------------------------


def make_tape(n: int = 5) -> Tape:
    return Tape("t", SCHEMA, np.arange(n), np.zeros(n, np.int32), np.zeros((n, 3), np.float32))


def test_slice() -> None:
    part = make_tape().slice(1, 4)
    assert len(part) == 3
    assert part.event_ns.tolist() == [1, 2, 3]
    assert part.features.shape == (3, 3)
    assert len(make_tape().slice(2, 2)) == 0
    for start, stop in ((-1, 2), (3, 2), (0, 6)):
        with pytest.raises(ConfigError, match="slice: expected 0 <= start <= stop <= 5"):
            make_tape().slice(start, stop)


def test_a_tape_refuses_columns_of_another_shape_or_dtype() -> None:
    good = make_tape()
    with pytest.raises(ConfigError, match=r"features: expected \[5, 3\] float32, found \[5, 2\] float32"):
        Tape("t", SCHEMA, good.event_ns, good.ids, np.zeros((5, 2), np.float32))
    with pytest.raises(ConfigError, match=r"ids: expected \[5\] int32, found \[5\] int64"):
        Tape("t", SCHEMA, good.event_ns, good.ids.astype(np.int64), good.features)


def test_schema_round_trip_and_differences() -> None:
    assert FeatureSchema.from_dict(SCHEMA.to_dict()) == SCHEMA
    SCHEMA.check_same(FeatureSchema(("a", "b"), ("x", "y", "z"), "trades", 1))
    for other, says in (
        (FeatureSchema(("a", "b"), ("x", "y", "z"), "csv", 1), "codec: expected 'trades', found 'csv'"),
        (FeatureSchema(("a", "b"), ("x", "y", "z"), "trades", 2), "version: expected 1, found 2"),
        (FeatureSchema(("a", "c"), ("x", "y", "z"), "trades", 1), "symbols[1]: expected 'b', found 'c'"),
        (FeatureSchema(("a", "b"), ("x", "q", "w"), "trades", 1), "features[1]: expected 'y', found 'q'"),
        (FeatureSchema(("a", "b"), ("x", "y"), "trades", 1), "features: expected 3, found 2"),
    ):
        with pytest.raises(ConfigError) as caught:
            SCHEMA.check_same(other)
        assert says in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"extra": 1}, {"version": "1"}, {"version": True}, {"symbols": "ab"}, {"features": [1]}, {"codec": None}],
)
def test_schema_refuses_a_bad_dict(change: dict) -> None:
    with pytest.raises(ConfigError, match="feature schema"):
        FeatureSchema.from_dict({**SCHEMA.to_dict(), **change})
    missing = SCHEMA.to_dict()
    del missing["codec"]
    with pytest.raises(ConfigError, match="expected the keys"):
        FeatureSchema.from_dict(missing)


# --- the real tape ---------------------------------------------------------------------------------------------------


def test_emini() -> None:
    try:
        importlib.metadata.distribution("mlfinpy")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mlfinpy is not installed: pip install --no-deps mlfinpy==0.1.2")
    tape = load_tape("trades:emini")
    assert tape.name == "emini"
    assert len(tape) == 84_568
    assert np.bincount(tape.ids).tolist() == [10_858, 62_865, 10_845]
    assert np.isfinite(tape.features).all()
    assert (np.diff(tape.event_ns) >= MS).all()


class FakeDistribution:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def locate_file(self, path: str) -> Path:
        return self.folder / path


def test_emini_missing_or_damaged_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "pip install --no-deps mlfinpy==0.1.2"
    monkeypatch.setattr(tape_module, "_EMINI_PACKAGE", "no-such-package-here")
    with pytest.raises(ConfigError, match="expected the package no-such-package-here, found none; run: pip install"):
        load_tape("trades:emini")
    monkeypatch.undo()
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: FakeDistribution(tmp_path))
    with pytest.raises(ConfigError, match=command):
        load_tape("trades:emini")
    file = tmp_path / "mlfinpy/dataset/data/tick_data.csv"
    file.parent.mkdir(parents=True)
    file.write_text("DateTime,Price,Volume\n")
    found = hashlib.md5(file.read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match=f"md5 .*, found {found}; run: {command}"):
        load_tape("trades:emini")


def test_a_mirrored_tape_is_the_tape_of_mirrored_prices() -> None:
    random = np.random.default_rng(5)
    time_ns = np.cumsum(random.integers(0, 3, 400)) * 1_000_000
    price = 1000.0 + 0.25 * np.cumsum(random.integers(-1, 2, 400))
    volume = random.integers(1, 9, 400).astype(np.float64)
    schema = FeatureSchema(TRADE_SYMBOLS, TRADE_FEATURES, "trades", 1)
    tape, wanted = (Tape("t", schema, *trade_events(time_ns, p, volume)) for p in (price, 2000.0 - price))
    found = mirrored(tape)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_allclose(found.features, wanted.features, rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="mirror: expected a tape of trades or lobster, found one of other"):
        mirrored(Tape("t", dataclasses.replace(schema, codec="other"), tape.event_ns, tape.ids, tape.features))


# --- targets ---------------------------------------------------------------------------------------------------------


def test_targets_are_checked_and_sliced() -> None:
    n = 4
    columns = np.arange(n, dtype=np.int64), np.zeros(n, np.int32), np.zeros((n, 3), np.float32)
    mid = np.array([1.0, 2.0, np.nan, 4.0])
    tape = Tape("t", SCHEMA, *columns, targets={"mid": mid})
    np.testing.assert_array_equal(tape.slice(1, 3).targets["mid"], mid[1:3])
    with pytest.raises(ConfigError, match=r"targets\['mid'\]: expected \[4\] float64, found \[3\] float64"):
        Tape("t", SCHEMA, *columns, targets={"mid": mid[:3]})
    with pytest.raises(ConfigError, match=r"targets\['mid'\]: expected \[4\] float64, found \[4\] float32"):
        Tape("t", SCHEMA, *columns, targets={"mid": mid.astype(np.float32)})
