"""The codec `csv`: what a declared schema says, and helpful errors where it or the file is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamattn.errors import ConfigError
from streamattn.tape import load_tape

SCHEMA = """
[time]
column = "when"
unit = "ms"

[symbol]
column = "kind"
names = ["buy", "sell"]

[features.volume]
column = "qty"
transform = "log1p"
clip = [0.0, 2.0]

[features.price]
transform = "diff"

[features.heat]

[mid]
columns = ["bid", "ask"]
"""
HEADER = "when,kind,qty,price,heat,bid,ask"
ROWS = ("1000,buy,0,10.0,-1,9,11", "1000,sell,2,10.5,-2,10,11", "1002.5,buy,1000,10.25,-3,10,12")


def write(folder: Path, *rows: str, schema: str = SCHEMA, header: str = HEADER) -> str:
    (folder / "mine.csv").write_text("\n".join([header, *rows]) + "\n")
    (folder / "mine.toml").write_text(schema)
    return f"csv:{folder / 'mine.csv'}"


def test_the_columns_are_what_the_schema_says(tmp_path: Path) -> None:
    tape = load_tape(write(tmp_path, *ROWS))
    assert tape.name == "mine"
    assert tape.schema.symbols == ("buy", "sell")
    assert tape.schema.features == ("volume", "price", "heat")
    assert tape.schema.codec == "csv:mine"
    assert tape.ids.tolist() == [0, 1, 0]
    assert tape.event_ns.tolist() == [1_000_000_000, 1_000_000_000, 1_002_500_000]
    wanted = [[0, 0, -1], [np.log(3), 0.5, -2], [2, -0.25, -3]]
    np.testing.assert_allclose(tape.features, np.array(wanted, np.float32))
    assert tape.targets["mid"].tolist() == [10, 10.5, 11]


def test_another_schema_and_symbols_from_a_change(tmp_path: Path) -> None:
    spec = write(tmp_path, *ROWS)
    other = tmp_path / "other.toml"
    other.write_text('name = "moves"\n[time]\ncolumn = "when"\nunit = "s"\n[symbol]\nchange = "price"\n')
    tape = load_tape(f"{spec}?schema={other}")
    assert tape.schema.codec == "csv:moves"
    assert [tape.schema.symbols[i] for i in tape.ids] == ["flat", "up", "down"]
    assert tape.features.shape == (3, 0)
    assert tape.targets == {}


def test_no_input_depends_on_the_next_row(tmp_path: Path) -> None:
    whole = load_tape(write(tmp_path, *ROWS))
    for n in (1, 2):
        cut = load_tape(write(tmp_path, *ROWS[:n]))
        np.testing.assert_array_equal(cut.features, whole.features[:n])
        np.testing.assert_array_equal(cut.ids, whole.ids[:n])


def test_nanoseconds_and_iso_times_are_exact(tmp_path: Path) -> None:
    schema = '[time]\ncolumn = "t"\nunit = "{}"\n[symbol]\nchange = "x"\n'
    spec = write(tmp_path, "1378054800000000001,1", schema=schema.format("ns"), header="t,x")
    assert load_tape(spec).event_ns.tolist() == [1378054800000000001]
    spec = write(tmp_path, "1378054800.000000001,1", schema=schema.format("s"), header="t,x")
    assert load_tape(spec).event_ns.tolist() == [1378054800000000001]
    spec = write(tmp_path, "2013-09-01 17:00:00.000000001,1", schema=schema.format("iso"), header="t,x")
    assert load_tape(spec).event_ns.tolist() == [1378054800000000001]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[symbol]", "[symbl]", r"symbl: expected one of .*, found 'symbl'; did you mean symbol\?"),
        ("unit", "units", r"time.units: expected one of column, unit, .*did you mean unit\?"),
        ("clip =", "clp =", r"features.volume.clp: .*did you mean clip\?"),
        ('"log1p"', '"log"', "Invalid enum value 'log'"),
        ('"ms"', '"minutes"', "Invalid enum value 'minutes'"),
        ("[0.0, 2.0]", "[2.0, 0.0]", r"features.volume.clip: expected \[low, high\]"),
        ('column = "kind"', 'change = "price"', "symbol: expected column and names, or change"),
        ('["buy", "sell"]', '["buy", "buy"]', "symbol.names: expected distinct names"),
        ('["buy", "sell"]', '["buy"]', "line 3: expected kind to be one of buy, found 'sell'"),
        ('"qty"', '"qyt"', r"line 1: expected a column 'qyt', found .*did you mean qty\?"),
        ("[mid]", "[mid", "expected TOML, found"),
        ('transform = "log1p"', 'column = "heat"', "expected TOML, found"),
        ("[features.heat]", '[features.heat]\ntransform = "log1p"', "line 2: expected heat of 0 or more, found -1.0"),
    ],
)
def test_a_wrong_schema_is_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in SCHEMA
    with pytest.raises(ConfigError, match=says):
        load_tape(write(tmp_path, *ROWS, schema=SCHEMA.replace(old, new)))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("1003,buy,x,10,1,9,11", "line 5: expected a number as qty, found 'x'"),
        ("1003,buy,1,inf,1,9,11", "line 5: expected a finite price, found inf"),
        ("1003,buy,1,10,1,9", "line 5: expected 7 columns, found 6"),
        ("999,buy,1,10,1,9,11", "line 5: expected a time not before the line above"),
        ("1e30,buy,1,10,1,9,11", "line 5: expected a time in ms since 1970"),
        ("nan,buy,1,10,1,9,11", "line 5: expected a time in ms since 1970"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_tape(write(tmp_path, *ROWS, row))


def test_missing_files_are_named(tmp_path: Path) -> None:
    spec = write(tmp_path, *ROWS)
    with pytest.raises(ConfigError, match="expected a schema for the CSV file, found none"):
        load_tape(f"{spec}?schema={tmp_path / 'none.toml'}")
    with pytest.raises(ConfigError, match=r"expected \?schema=FILE, found \?schem=x"):
        load_tape(f"{spec}?schem=x")
    with pytest.raises(ConfigError, match="expected a header and at least one row"):
        load_tape(write(tmp_path))
