"""LatencyHistogram: percentiles of any number of latencies in constant memory."""

from __future__ import annotations

import math

_SPLIT_BITS = 7  # each doubling is split into 2^7 buckets: a bucket is at most 1/128 of its values wide
_SPLITS = 1 << _SPLIT_BITS
MAX_TRACKED_NS = 1_000_000_000_000  # 1000 s; longer ones share the last bucket, `max` still knows the longest


def _bucket(ns: int) -> int:
    """Return the bucket of a latency: exact up to 255 ns, then the eight leading bits count."""
    if ns < _SPLITS:
        return ns
    shift = ns.bit_length() - _SPLIT_BITS - 1
    return (shift << _SPLIT_BITS) + (ns >> shift)


def _highest(bucket: int) -> int:
    """Return the longest latency, in nanoseconds, that falls into a bucket."""
    if bucket < 2 * _SPLITS:
        return bucket
    shift = (bucket >> _SPLIT_BITS) - 1
    return ((bucket - (shift << _SPLIT_BITS) + 1) << shift) - 1


_OVERFLOW = _bucket(MAX_TRACKED_NS) + 1


class LatencyHistogram:
    """Counts latencies in log-linear buckets: about two significant digits from 1 us to 1000 s, in 35 kB for ever.

    `percentile` never reports less than the true value and at most 1/128 more. Not for use from several threads.

    Attributes:
        count: latencies recorded.
        max: the longest of them in nanoseconds, exact; 0 if there is none.
    """

    __slots__ = ("_buckets", "count", "max")

    def __init__(self) -> None:
        self._buckets = [0] * (_OVERFLOW + 1)
        self.count = 0
        self.max = 0

    def record(self, ns: int) -> None:
        """Count one latency.

        Raises:
            ValueError: it is negative, so two different clocks were subtracted.
        """
        if ns > MAX_TRACKED_NS:
            bucket = _OVERFLOW
        elif ns >= _SPLITS:  # as in _bucket; a call would double the cost
            shift = ns.bit_length() - 8
            bucket = (shift << 7) + (ns >> shift)
        elif ns >= 0:
            bucket = ns
        else:
            raise ValueError(f"latency: expected 0 ns or more, found {ns}")
        self._buckets[bucket] += 1
        self.count += 1
        if ns > self.max:
            self.max = ns

    def percentile(self, p: float) -> int:
        """Return the latency in nanoseconds that `p` percent did not exceed (nearest rank); 0 if there is none.

        Raises:
            ValueError: `p` is not within 0 to 100.
        """
        if not 0 <= p <= 100:
            raise ValueError(f"percentile: expected 0 to 100, found {p}")
        # Rounded first: 99.9 / 100 * 1000 must be rank 999 and not, by its last bit, 1000.
        rank = max(1, math.ceil(round(p * self.count / 100, 6)))
        if rank >= self.count:
            return self.max
        seen = 0
        for bucket, count in enumerate(self._buckets[:_OVERFLOW]):
            seen += count
            if seen >= rank:
                return min(_highest(bucket), self.max)
        return self.max

    def merge(self, other: LatencyHistogram) -> None:
        """Add another histogram's latencies to this one's."""
        self._buckets = [mine + theirs for mine, theirs in zip(self._buckets, other._buckets, strict=True)]
        self.count += other.count
        self.max = max(self.max, other.max)

    def to_dict(self) -> dict[str, float]:
        """Return p50, p99, p99_9 and max in microseconds."""
        nanoseconds = {
            "p50": self.percentile(50),
            "p99": self.percentile(99),
            "p99_9": self.percentile(99.9),
            "max": self.max,
        }
        return {name: value / 1000 for name, value in nanoseconds.items()}
