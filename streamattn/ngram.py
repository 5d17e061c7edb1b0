"""The rival that a streaming model has to beat: an interpolated Witten-Bell n-gram over symbols.

With `c(h, s)` the times that symbol `s` followed the context `h`, `c(h)` their sum over `s` and `T(h)` the number of
distinct symbols seen after `h`, the probability after a context of `k` symbols is

    p_k(s | h) = (c(h, s) + T(h) p_{k-1}(s | h')) / (c(h) + T(h))

where `h'` is `h` without its oldest symbol; a context never seen takes `p_{k-1}`, and `p_{-1}` is uniform.
(Witten and Bell, "The zero-frequency problem", IEEE Trans. Inf. Theory 37(4), 1991; interpolated form as in Chen and
Goodman, 1998, section 2.4.)

`order` is the number of symbols in the longest context: order 0 knows frequencies only.
`NGram` counts one symbol at a time, as a stream delivers them. `static_bits`, `online_bits` and `best_online` score
whole arrays at once and give the same numbers. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from streamattn.errors import ConfigError


class NGram:
    """An n-gram that learns one symbol at a time.

    Args:
        num_symbols: symbols are the ints `0 … num_symbols - 1`.
        order: number of symbols in the longest context, 0 or more.

    Raises:
        ConfigError: `num_symbols` below 1 or `order` below 0.
    """

    def __init__(self, num_symbols: int, order: int) -> None:
        _check_sizes(num_symbols, order)
        self.num_symbols = num_symbols
        self.order = order
        self._counts: dict[tuple[int, ...], list[int]] = {}

    def update(self, history: Sequence[int], symbol: int) -> None:
        """Count `symbol` after every context that ends `history` (oldest first; only the last `order` matter).

        Raises:
            ConfigError: `symbol` is not in `[0, num_symbols)`.
        """
        if not 0 <= symbol < self.num_symbols:
            raise ConfigError(f"symbol: expected 0 to {self.num_symbols - 1}, found {symbol}")
        for context in self._contexts(history):
            counts = self._counts.get(context)
            if counts is None:
                counts = self._counts[context] = [0] * self.num_symbols
            counts[symbol] += 1

    def probabilities(self, history: Sequence[int]) -> np.ndarray:
        """Return p(next symbol | history): [num_symbols] float64, summing to 1."""
        result = np.full(self.num_symbols, 1.0 / self.num_symbols)
        for context in self._contexts(history):
            counts = self._counts.get(context)
            if counts is None:
                break  # a longer context that ends in an unseen one is unseen too
            seen = np.array(counts, np.float64)
            distinct = np.count_nonzero(seen)
            result = (seen + distinct * result) / (seen.sum() + distinct)
        return result

    def _contexts(self, history: Sequence[int]) -> Iterator[tuple[int, ...]]:
        # Shortest first: (), (last,), (last but one, last), …
        recent = tuple(int(s) for s in history[max(0, len(history) - self.order) :])
        return (recent[len(recent) - k :] for k in range(len(recent) + 1))


def static_bits(train: np.ndarray, test: np.ndarray, order: int, num_symbols: int | None = None) -> np.ndarray:
    """Return the bits of each symbol of `test` under counts of `train` alone.

    Args:
        train: [M] ints, counted.
        test: [N] ints, scored. They follow `train` directly, so the first contexts reach back into it.
        order: length of the longest context.
        num_symbols: size of the alphabet; by default the largest symbol of either array plus one.

    Returns:
        [N] float64, -log2 p.

    Raises:
        ConfigError: negative order, or symbols that are no ints in `[0, num_symbols)`.
    """
    symbols, num_symbols = _join(train, test, order, num_symbols)
    return _bits(symbols, len(train), num_symbols, order, online=False)[-1]


def online_bits(train: np.ndarray, test: np.ndarray, order: int, num_symbols: int | None = None) -> np.ndarray:
    """Return the bits of each symbol of `test` under counts of everything before that symbol, `train` included.

    Arguments, result and errors are those of `static_bits`.
    """
    symbols, num_symbols = _join(train, test, order, num_symbols)
    return _bits(symbols, len(train), num_symbols, order, online=True)[-1]


def best_online(
    train: np.ndarray, test: np.ndarray, orders: Sequence[int] = range(9), num_symbols: int | None = None
) -> tuple[int, np.ndarray]:
    """Return (order, bits) of the online n-gram whose mean on `test` is lowest: chosen in hindsight, in its favour.

    Arguments and bits are those of `online_bits`; `orders` are the candidates.

    Raises:
        ConfigError: as `static_bits`; also for no candidate or an empty `test`.
    """
    if not len(orders):
        raise ConfigError("orders: expected at least one, found none")
    if min(orders) < 0:
        raise ConfigError(f"orders: expected 0 or more each, found {min(orders)}")
    if not len(test):
        raise ConfigError("test: expected at least one symbol, found none")
    symbols, num_symbols = _join(train, test, max(orders), num_symbols)
    bits = _bits(symbols, len(train), num_symbols, max(orders), online=True)
    best = min(orders, key=lambda order: bits[order].mean())
    return best, bits[best]


# --- whole arrays at once --------------------------------------------------------------------------------------------


def _check_sizes(num_symbols: int, order: int) -> None:
    if num_symbols < 1:
        raise ConfigError(f"num_symbols: expected 1 or more, found {num_symbols}")
    if order < 0:
        raise ConfigError(f"order: expected 0 or more, found {order}")


def _join(train: np.ndarray, test: np.ndarray, order: int, num_symbols: int | None) -> tuple[np.ndarray, int]:
    train, test = np.asarray(train), np.asarray(test)
    for name, part in (("train", train), ("test", test)):
        if part.ndim != 1 or (len(part) and part.dtype.kind not in "iu"):
            raise ConfigError(f"{name}: expected a row of ints, found shape {list(part.shape)} of {part.dtype}")
    symbols = np.concatenate([train.astype(np.int64), test.astype(np.int64)])
    if num_symbols is None:
        num_symbols = int(symbols.max(initial=0)) + 1
    _check_sizes(num_symbols, order)
    if len(symbols) and not 0 <= symbols.min() <= symbols.max() < num_symbols:
        found = f"{symbols.min()} to {symbols.max()}"
        raise ConfigError(f"symbols: expected 0 to {num_symbols - 1}, found {found}")
    return symbols, num_symbols


def _bits(symbols: np.ndarray, start: int, num_symbols: int, order: int, *, online: bool) -> list[np.ndarray]:
    # Bits of symbols[start:] at each order 0 … `order`; one pass serves all, since each order builds on the one below.
    counted = np.ones(len(symbols)) if online else (np.arange(len(symbols)) < start).astype(np.float64)
    p = np.full(len(symbols), 1.0 / num_symbols)
    context = np.zeros(len(symbols), np.int64)  # number of the context of k symbols before t, for t = k, k + 1, …
    result = []
    for k in range(order + 1):
        if k:
            # k symbols before t: k - 1 before t - 1, then symbol t - 1. Renumbering keeps the codes below N.
            context = np.unique(context[:-1] * num_symbols + symbols[k - 1 : -1], return_inverse=True)[1]
        pair = context * num_symbols + symbols[k:]
        followed = _sum_before(pair, counted[k:])
        total = _sum_before(context, counted[k:])
        distinct = _sum_before(context, counted[k:] * _is_first(pair))
        weight = total + distinct
        p[k:] = np.where(weight > 0, (followed + distinct * p[k:]) / np.maximum(weight, 1), p[k:])
        result.append(-np.log2(p[start:]))
    return result


def _is_first(keys: np.ndarray) -> np.ndarray:
    first = np.zeros(len(keys))
    first[np.unique(keys, return_index=True)[1]] = 1
    return first


def _sum_before(keys: np.ndarray, amounts: np.ndarray) -> np.ndarray:
    # result[t] = sum of amounts[s] over s < t with keys[s] == keys[t]: a running sum within each group of equal keys.
    order = np.argsort(keys, kind="stable")
    ordered, amounts = keys[order], amounts[order]
    before = np.cumsum(amounts) - amounts
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(keys) else np.zeros(0, np.int64)
    sizes = np.diff(np.append(starts, len(keys)))
    result = np.empty(len(keys))
    result[order] = before - np.repeat(before[starts], sizes)
    return result
