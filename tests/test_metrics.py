"""LatencyHistogram against sorted lists."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamattn.metrics import MAX_TRACKED_NS, LatencyHistogram

latencies = st.one_of(
    st.integers(0, 2_000), st.integers(1_000, MAX_TRACKED_NS), st.floats(0, 12).map(lambda x: int(10**x))
)


def filled(values: list[int]) -> LatencyHistogram:
    histogram = LatencyHistogram()
    for value in values:
        histogram.record(value)
    return histogram


@given(st.lists(latencies, min_size=1, max_size=200), st.sampled_from([0, 0.1, 25, 50, 90, 99, 99.9, 99.99, 100]))
def test_percentiles_are_at_most_one_percent_above_the_true_ones(values: list[int], p: float) -> None:
    histogram = filled(values)
    true = sorted(values)[max(0, math.ceil(round(p * len(values) / 100, 6)) - 1)]
    assert true <= histogram.percentile(p) <= true * (1 + 1 / 128)
    assert (histogram.count, histogram.max) == (len(values), max(values))
    assert histogram.percentile(100) == max(values)


@given(st.lists(latencies, max_size=50), st.lists(latencies, max_size=50))
def test_merging_is_recording_both(left: list[int], right: list[int]) -> None:
    merged, both = filled(left), filled(left + right)
    merged.merge(filled(right))
    assert (merged.count, merged.max, merged.to_dict()) == (both.count, both.max, both.to_dict())
    assert [merged.percentile(p) for p in range(101)] == [both.percentile(p) for p in range(101)]


def test_every_doubling_keeps_its_precision_up_to_1000_s() -> None:
    value = 1
    while value <= MAX_TRACKED_NS:
        for ns in (value - 1, value, value + 1):
            found = filled([ns, MAX_TRACKED_NS]).percentile(50)
            assert ns <= found <= ns * (1 + 1 / 128)
        value *= 2


def test_latencies_off_the_scale_are_counted_and_the_longest_is_known() -> None:
    histogram = filled([1_000, 5 * MAX_TRACKED_NS, 7 * MAX_TRACKED_NS])
    assert histogram.count == 3
    assert histogram.percentile(1) == 1_003  # the end of its bucket
    assert histogram.percentile(60) == histogram.percentile(100) == histogram.max == 7 * MAX_TRACKED_NS


def test_ranks_do_not_suffer_from_binary_fractions() -> None:
    histogram = filled([100] * 999 + [10_000])
    assert histogram.percentile(99.9) == 100
    assert histogram.percentile(99.91) == 10_000


def test_dictionary_is_in_microseconds() -> None:
    assert LatencyHistogram().to_dict() == {"p50": 0.0, "p99": 0.0, "p99_9": 0.0, "max": 0.0}
    found = filled([1_000_000] * 990 + [2_000_000] * 9 + [3_000_000]).to_dict()
    assert found == pytest.approx({"p50": 1000, "p99": 1000, "p99_9": 2000, "max": 3000}, rel=0.01)
    assert found["max"] == 3000.0


def test_memory_is_constant() -> None:
    histogram = LatencyHistogram()
    before = sys.getsizeof(histogram._buckets), len(histogram._buckets)
    for exponent in range(60):
        histogram.record(2**exponent)
    assert (sys.getsizeof(histogram._buckets), len(histogram._buckets)) == before
    assert before[0] < 40_000


def test_impossible_values_are_refused() -> None:
    histogram = LatencyHistogram()
    with pytest.raises(ValueError, match="latency: expected 0 ns or more, found -1"):
        histogram.record(-1)
    assert histogram.count == 0
    for p in (-0.1, 100.1):
        with pytest.raises(ValueError, match="percentile: expected 0 to 100"):
            histogram.percentile(p)
