"""`resident` while a trading day streams through the cache: how long orders live, by arithmetic and by asking.

Of all deletions and executions (types 3 and 4), those that name an order submitted fewer than W events before; orders
whose submission is older than the file count as never resident. Partial cancels (type 2) are answered, too, but not
counted: with them GOOG's shares round to the same, AMZN's last one to 88. Executions of hidden orders (type 5) name
nothing that could be looked up.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from streamattn.cache import StreamCache
from streamattn.context import Rows, StreamContext
from streamattn.lobster import order_submissions
from streamattn.pattern import Global, Pattern, Strided, Window

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "market"
SHARES = {  # percent of deletions and executions, for W = 8, 32, 128, 512
    "GOOG_2012-06-21_10": (147_916, (33, 62, 87, 94)),
    "AMZN_2012-06-21_5": (155_935, (38, 67, 86, 89)),
}
WINDOWS = (8, 32, 128, 512)
LANES = 96


class Day(NamedTuple):
    submitted: np.ndarray  # [N] int64, position of the submission that an event names, or -1
    counted: np.ndarray  # [N] bool: a deletion or execution


@pytest.fixture(scope="module", params=SHARES)
def day(request: pytest.FixtureRequest) -> tuple[str, Day]:
    file = DATA / f"LOBSTER_SampleFile_{request.param}.zip"
    if not file.is_file():
        pytest.skip(f"needs the LOBSTER sample {file.name} in {DATA}, which may not be redistributed")
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if "_message_" in name)
        kind = np.loadtxt(io.TextIOWrapper(archive.open(name)), np.int64, delimiter=",", usecols=1)
    return request.param, Day(order_submissions(file), np.isin(kind, (3, 4)))


def attention_only(pattern: Pattern, lanes: int) -> StreamCache:
    """Return a cache of one layer, as small as keys can be: what they hold does not matter here."""
    return StreamCache([pattern], lanes=lanes, kv_heads=1, head_dim=2)


@torch.inference_mode()
def push(cache: StreamCache, lanes: list[int], tokens: int) -> None:
    """Append tokens to each lane."""
    context = StreamContext(cache, Rows(lanes, [tokens] * len(lanes)), 1.0)
    x = torch.zeros(tokens * len(lanes), 1, 2)
    context.attend(0, x, x, x)
    context.commit()


def asked_at_each_event(day: Day, window: int) -> np.ndarray:
    """Return for each event whether the order it names was resident when the event had just been taken: [N] bool.

    Every event goes through the cache as a token of its own. The day is cut into as many runs as there are lanes, which
    go side by side, each one begun `window` events early: so it has all of the past that it could be asked about.
    """
    total = len(day.submitted)
    cache = attention_only(Pattern(Window(window)), LANES)
    lanes = list(range(LANES))
    cuts = np.linspace(0, total, LANES + 1).astype(np.int64)
    begin = np.maximum(cuts[:-1] - window, 0)
    answers = np.zeros(total, bool)
    asked = np.zeros(total, np.int64)
    for step in range(int((cuts[1:] - begin).max())):
        push(cache, lanes, 1)
        now = begin + step
        mine = (now >= cuts[:-1]) & (now < cuts[1:])  # the rest are lanes at a run-in, or done
        named = np.where(mine, day.submitted[np.minimum(now, total - 1)] - begin, -1)
        found = cache.resident_many(lanes, named.tolist()).numpy()
        answers[now[mine]] = found[mine]
        asked[now[mine]] += 1
    assert (asked == 1).all()
    return answers


@pytest.mark.parametrize("window", WINDOWS)
def test_the_shares_of_orders_still_resident_are_those_of_the_data(day: tuple[str, Day], window: int) -> None:
    name, events = day
    total, shares = SHARES[name]
    assert len(events.submitted) == total
    answers = asked_at_each_event(events, window)
    age = np.arange(total) - events.submitted
    np.testing.assert_array_equal(answers, (events.submitted >= 0) & (age < window))
    assert round(100 * float(answers[events.counted].mean())) == shares[WINDOWS.index(window)]


@pytest.mark.parametrize("window", [8, 512])
def test_one_lane_takes_the_whole_day(day: tuple[str, Day], window: int) -> None:
    """Absolute positions to the last event, in chunks of any size; asked of all orders that the last chunk named."""
    _, events = day
    total = len(events.submitted)
    cache = attention_only(Pattern(Window(window)), 1)
    random = np.random.default_rng(0)
    seen = 0
    while seen < total:
        size = min(int(random.choice([1, 30, 90, 400])), total - seen)
        push(cache, [0], size)
        named = events.submitted[seen : seen + size]
        seen += size
        found = cache.resident_many([0] * size, named.tolist())
        np.testing.assert_array_equal(found.numpy(), (named >= 0) & (seen - 1 - named < window))
        assert cache.resident(0, int(named[-1])) == bool(found[-1])
    assert int(cache.position[0]) == total


def test_many_at_once_are_each_as_asked_alone() -> None:
    pattern = Pattern(Window(5), Global(first=2, pinned=1), Strided(every=3, keep=2))
    cache = attention_only(pattern, 3)
    for lane, tokens in enumerate((1, 17, 40)):
        push(cache, [lane], tokens)
    cache.pin(1, 15)
    push(cache, [1], 20)
    pairs = [(lane, position) for lane in range(3) for position in range(-1, 45)]
    lanes, positions = zip(*pairs, strict=True)
    found = cache.resident_many(lanes, positions).tolist()
    assert found == [cache.resident(*pair) for pair in pairs]
    kept = {lane: {p for (row, p), yes in zip(pairs, found, strict=True) if yes and row == lane} for lane in range(3)}
    assert kept[0] == {0}
    assert kept[1] == {0, 1, 15, 26, 29, *range(32, 37)}
    assert kept[2] == {0, 1, 29, 32, *range(35, 40)}


def test_none_at_once_is_no_one() -> None:
    assert attention_only(Pattern(Window(5)), 1).resident_many([], []).tolist() == []
