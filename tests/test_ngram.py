import importlib.metadata

import numpy as np
import pytest

from streamattn.errors import ConfigError
from streamattn.ngram import NGram, best_online, online_bits, static_bits
from streamattn.tape import load_tape


def brute_force(counted: list[int], history: list[int], order: int, num_symbols: int) -> list[float]:
    """Probabilities by the definition alone: recount everything for one query. Slow on purpose."""
    order = min(order, len(history))
    below = [1 / num_symbols] * num_symbols if order == 0 else brute_force(counted, history, order - 1, num_symbols)
    context = history[len(history) - order :]
    follows = [counted[i] for i in range(order, len(counted)) if counted[i - order : i] == context]
    if not follows:
        return below
    distinct = len(set(follows))
    return [(follows.count(s) + distinct * below[s]) / (len(follows) + distinct) for s in range(num_symbols)]


def random_symbols(seed: int, n: int, num_symbols: int) -> list[int]:
    # A chain that repeats itself often, so that long contexts are seen again.
    rng = np.random.default_rng(seed)
    symbols = [int(s) for s in rng.integers(0, num_symbols, 3)]
    while len(symbols) < n:
        symbols.append(symbols[-3] if rng.random() < 0.6 else int(rng.integers(0, num_symbols)))
    return symbols[:n]


@pytest.mark.parametrize("num_symbols", [2, 3, 5])
@pytest.mark.parametrize("order", [0, 1, 2, 4, 7])
def test_all_forms_follow_the_definition(num_symbols: int, order: int) -> None:
    symbols = random_symbols(order + 10 * num_symbols, 60, num_symbols)
    start = 35
    train, test = np.array(symbols[:start]), np.array(symbols[start:])
    static = static_bits(train, test, order, num_symbols)
    online = online_bits(train, test, order, num_symbols)
    model = NGram(num_symbols, order)
    for i, symbol in enumerate(symbols):
        p = brute_force(symbols[:i], symbols[:i], order, num_symbols)
        np.testing.assert_allclose(model.probabilities(symbols[:i]), p, rtol=1e-12)
        if i >= start:
            assert online[i - start] == pytest.approx(-np.log2(p[symbol]), rel=1e-12)
            p = brute_force(symbols[:start], symbols[:i], order, num_symbols)
            assert static[i - start] == pytest.approx(-np.log2(p[symbol]), rel=1e-12)
        model.update(symbols[:i], symbol)


def test_a_value_by_hand() -> None:
    # After 0 0 1 0: order 0 counts (3, 1), T = 2; context 0 was followed by 0, 1: counts (1, 1), T = 2.
    model = NGram(2, 1)
    for i, symbol in enumerate([0, 0, 1, 0]):
        model.update([0, 0, 1, 0][:i], symbol)
    lower = (3 + 2 * 0.5) / (4 + 2)
    assert model.probabilities([0])[0] == pytest.approx((1 + 2 * lower) / (2 + 2))
    assert model.probabilities([])[0] == pytest.approx(lower)


@pytest.mark.parametrize("seed", range(10))
def test_probabilities_sum_to_one(seed: int) -> None:
    symbols = random_symbols(seed, 200, 4)
    model = NGram(4, 5)
    assert model.probabilities([]).tolist() == [0.25] * 4
    for i, symbol in enumerate(symbols):
        p = model.probabilities(symbols[:i])
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert (p > 0).all()
        model.update(symbols[:i], symbol)


def test_online_bits_do_not_see_the_future() -> None:
    symbols = np.array(random_symbols(3, 300, 3))
    changed = symbols.copy()
    changed[200:] = (changed[200:] + 1) % 3
    kept = online_bits(symbols[:100], symbols[100:], 4, 3)[:100]
    np.testing.assert_array_equal(kept, online_bits(changed[:100], changed[100:], 4, 3)[:100])


def test_best_online_is_the_best_of_its_candidates() -> None:
    symbols = np.array(random_symbols(5, 2_000, 3))
    train, test = symbols[:1_000], symbols[1_000:]
    means = {order: online_bits(train, test, order).mean() for order in range(9)}
    order, bits = best_online(train, test)
    assert order == min(means, key=lambda k: means[k]) == 3  # the chain looks three symbols back
    np.testing.assert_array_equal(bits, online_bits(train, test, order))
    assert best_online(train, test, orders=[1, 2])[0] in (1, 2)


def test_short_and_empty_arrays() -> None:
    empty = np.array([], np.int64)
    assert online_bits(empty, empty, 3, 2).shape == (0,)
    assert static_bits(np.array([1]), empty, 3, 2).shape == (0,)
    assert static_bits(empty, np.array([0, 1]), 3, 2).tolist() == [1.0, 1.0]
    assert online_bits(empty, np.array([0]), 8, 4).tolist() == [2.0]


def test_bad_arguments() -> None:
    some = np.array([0, 1, 2])
    for call, says in (
        (lambda: NGram(0, 1), "num_symbols: expected 1 or more, found 0"),
        (lambda: NGram(3, -1), "order: expected 0 or more, found -1"),
        (lambda: NGram(3, 1).update([], 3), "symbol: expected 0 to 2, found 3"),
        (lambda: online_bits(some, some, -1), "order: expected 0 or more, found -1"),
        (lambda: online_bits(some, some, 1, 2), "symbols: expected 0 to 1, found 0 to 2"),
        (lambda: static_bits(some, -some, 1), "symbols: expected 0 to 2, found -2 to 2"),
        (lambda: static_bits(some.astype(float), some, 1), "train: expected a row of ints"),
        (lambda: best_online(some, some, []), "orders: expected at least one, found none"),
        (lambda: best_online(some, some, [-1]), "orders: expected 0 or more each, found -1"),
        (lambda: best_online(some, np.array([], np.int64)), "test: expected at least one symbol, found none"),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert says in str(caught.value)


def test_the_baseline_of_the_real_tape() -> None:
    try:
        importlib.metadata.distribution("mlfinpy")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mlfinpy is not installed: pip install --no-deps mlfinpy==0.1.2")
    ids = load_tape("trades:emini").ids
    for share, published in ((0.8, 0.866), (0.7, 0.857)):
        start = int(share * len(ids))
        order, bits = best_online(ids[:start], ids[start:])
        assert order == 5
        assert bits.mean() == pytest.approx(published, abs=5e-4)
        assert static_bits(ids[:start], ids[start:], order).mean() > bits.mean()
