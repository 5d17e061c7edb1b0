"""Training and scoring: it learns, it is repeatable, streaming and parallel scores agree, overlap is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from streamattn.checkpoint import Checkpoint, load_checkpoint, shipped_model
from streamattn.errors import ConfigError
from streamattn.evaluate import draw_running
from streamattn.ngram import best_online
from streamattn.scores import (
    calibration,
    class_results,
    event_bits,
    gap_targets,
    move_targets,
    online_class_bits,
    online_quantiles,
    pinball,
)
from streamattn.tape import FeatureSchema, Tape
from streamattn.train import TrainOptions, _Fit, _new_model, evaluate, fingerprint, parallel_bits, streaming_bits, train

SCHEMA = FeatureSchema(("a", "b", "c"), ("hint", "noise"), "test", 1)
QUICK = TrainOptions(
    layers=1, width=16, q_heads=2, kv_heads=1, head_dim=8, ffn=24, window=8, first=2, segments=4, chunk=32, epochs=4
)


def tape_of(seed: int, events: int = 4000) -> Tape:
    """Return a tape whose next id is given away by the feature "hint", nine times out of ten."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, 3, events).astype(np.int32)
    told = np.where(random.random(events) < 0.9, np.roll(ids, -1), random.integers(0, 3, events))
    features = np.stack([100 + 10 * told, random.standard_normal(events)], axis=1).astype(np.float32)
    return Tape(f"tape{seed}", SCHEMA, np.arange(events, dtype=np.int64) * 1000, ids, features)


@pytest.fixture(scope="module")
def fitted() -> tuple[Checkpoint, Tape]:
    tape = tape_of(1)
    return train({"test:1": tape}, QUICK), tape


def test_it_learns_what_an_ngram_cannot_see(fitted: tuple[Checkpoint, Tape]) -> None:
    checkpoint, tape = fitted
    score = evaluate(checkpoint, tape)
    assert (score.start, score.stop) == (3200, 4000)  # the last fifth by default
    assert score.events == 799
    assert score.bits_per_event < 0.9  # given the hint: 0.67 bits; without it 1.58
    assert score.ngram_online_bits > 1.5
    assert abs(score.bits_per_event - score.parallel_bits_per_event) < 1e-4


def test_the_same_seed_gives_the_same_weights(fitted: tuple[Checkpoint, Tape]) -> None:
    checkpoint, tape = fitted
    again = train({"test:1": tape}, QUICK)
    for name, value in checkpoint.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    other = train({"test:1": tape}, dataclasses.replace(QUICK, seed=1, epochs=1))
    name = "blocks.0.qkv.weight"
    assert not torch.equal(other.model.get_parameter(name), checkpoint.model.get_parameter(name))


def test_an_unseen_tape_is_scored_whole_and_overlap_is_refused(fitted: tuple[Checkpoint, Tape]) -> None:
    checkpoint, tape = fitted
    unseen = evaluate(checkpoint, tape_of(2, 500))
    assert (unseen.start, unseen.stop, unseen.events) == (0, 500, 499)
    assert any("did not count test:1" in note for note in unseen.notes)  # that spec names no file
    with pytest.raises(ConfigError, match="overlap with what the model was trained on"):
        evaluate(checkpoint, tape, start=3100)
    assert evaluate(checkpoint, tape, start=3100, allow_overlap=True).start == 3100
    with pytest.raises(ConfigError, match="range: expected at least two of 4000 events"):
        evaluate(checkpoint, tape, start=3999)
    wrong = Tape("w", dataclasses.replace(SCHEMA, features=("hint", "other")), tape.event_ns, tape.ids, tape.features)
    with pytest.raises(ConfigError, match="features"):
        evaluate(checkpoint, wrong)


def test_streaming_and_parallel_scores_agree_event_by_event(fitted: tuple[Checkpoint, Tape]) -> None:
    checkpoint, _ = fitted
    tape = tape_of(3, 700)
    wanted = parallel_bits(checkpoint.model, tape)
    for frame_events in (1, 7, 300):
        found = streaming_bits(checkpoint.model, tape, frame_events=frame_events)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


# --- several tapes, several heads ------------------------------------------------------------------------------------


def with_mid(seed: int, events: int = 4000) -> Tape:
    """Return `tape_of` with pauses told by the feature "noise", and a price that the id just seen moves."""
    tape = tape_of(seed, events)
    pause = np.exp(6 + np.clip(tape.features[:, 1], -3, 3)).astype(np.int64)
    mid = np.cumsum(tape.ids - 1.0)
    time_ns = np.concatenate(([0], np.cumsum(pause)[:-1]))
    return dataclasses.replace(tape, event_ns=time_ns, targets={"mid": mid})


def test_several_heads_learn_at_once_and_are_scored_beside_their_rivals(tmp_path: Path) -> None:
    tape = with_mid(1)
    options = dataclasses.replace(QUICK, heads=("next", "gap", "move"), horizon=1, epochs=6)
    checkpoint = train({"test:1": tape}, options)
    assert [head.name for head in checkpoint.model.config.heads] == ["next", "gap", "move"]
    score = evaluate(checkpoint, tape)
    assert score.bits_per_event < 0.95
    gap, move = score.heads["gap"], score.heads["move"]
    assert gap["pinball"] < 0.6 * min(gap["rivals"].values())  # the feature gives the pause away
    assert len(gap["coverage"]) == len(gap["levels"]) == 5
    assert move["bits"] < 0.95 < 1.5 < min(move["rivals"].values())  # the next id is the next move
    assert move["events"] == 799  # the last event of the range has no move to come
    assert score.to_dict()["heads"] == score.heads
    assert sum(row["count"] for row in score.classes) == score.events
    draw_running(score, tmp_path / "running.png", "test")
    assert (tmp_path / "running.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match="--picture: expected a picture file that can be written"):
        draw_running(score, tmp_path / "running.xyz", "test")


def test_a_head_that_the_tapes_cannot_supply_is_left_out() -> None:
    options = dataclasses.replace(QUICK, heads=("next", "move"), epochs=1)
    checkpoint = train({"test:1": with_mid(1), "test:2": tape_of(2)}, options)
    assert [head.name for head in checkpoint.model.config.heads] == ["next"]
    with pytest.raises(ConfigError, match="heads: expected next, and gap or move once each, found gap"):
        TrainOptions(heads=("gap",))


def test_no_segment_goes_from_one_tape_to_another() -> None:
    tapes = [tape_of(1, 1300), tape_of(2, 400), tape_of(3, 900)]
    options = dataclasses.replace(QUICK, segments=6)
    torch.manual_seed(0)
    fit = _Fit(_new_model(tapes, ["next"], options), [(tape,) for tape in tapes], tapes, options, None)
    borders = np.cumsum([0, 1300, 400, 900])
    walked: list[np.ndarray] = []
    real = fit._loss

    def watched(at, cache, rows, disturb):
        walked.append(at.reshape(6, -1))
        return real(at, cache, rows, disturb)

    fit._loss = watched
    fit._epoch()
    at = np.stack(walked, axis=1)  # [segments, steps, chunk]
    home = np.searchsorted(borders, at, side="right")
    assert (home == home[:, :1, :1]).all()
    assert (np.searchsorted(borders, at + 1, side="right") == home).all()  # what they are asked for, too
    assert set(home[:, 0, 0]) == {1, 2, 3}
    assert (np.diff(at, axis=2) == 1).all()
    jumps = at[:, 1:, 0] - at[:, :-1, -1]
    begins = borders[home[:, 0, 0] - 1][:, None]
    assert ((jumps == 1) | (at[:, 1:, 0] == begins)).all()  # on, or back to the beginning


def test_a_segment_that_begins_again_is_a_new_stream() -> None:
    tapes = [tape_of(1, 1300), tape_of(2, 400)]
    options = dataclasses.replace(QUICK, segments=2, chunk=64)
    torch.manual_seed(0)
    fit = _Fit(_new_model(tapes, ["next"], options), [(tape,) for tape in tapes], tapes, options, None)
    cache = fit.model.new_cache(2)
    cache.position[:] = 500
    cursor = np.array([600, 1300 + 384])
    fit._wrap(cursor, cache)
    assert cursor.tolist() == [600, 1300]
    assert cache.position.tolist() == [500, 0]


def test_jitter_is_repeatable_and_spares_the_odds() -> None:
    options = dataclasses.replace(QUICK, jitter=0.5, epochs=1)
    one, two = (train({"test:1": tape_of(1)}, options) for _ in range(2))
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name]), name
    assert one.training["options"]["jitter"] == 0.5
    tape = tape_of(1)
    odds = dataclasses.replace(tape, schema=dataclasses.replace(SCHEMA, features=("hint", "odds_a")))
    fit = _Fit(_new_model([odds], ["next"], options), [(odds,)], [odds], options, None)
    disturbed = fit._disturbance()
    assert disturbed is not None
    factor, offset = disturbed
    assert (factor[..., 1] == 1).all()
    assert (offset[..., 1] == 0).all()
    assert factor[..., 0].std() > 0.05


# --- scores ----------------------------------------------------------------------------------------------------------


def test_targets_are_what_follows() -> None:
    gaps = gap_targets(np.array([5, 5, 15]))
    np.testing.assert_allclose(gaps[:2], [0, np.log(11)])
    assert np.isnan(gaps[2])
    mid = np.array([1.0, 2.0, 1.0, 1.0, np.nan, 3.0])
    assert move_targets(mid, 1).tolist() == [2, 0, 1, -1, -1, -1]
    assert move_targets(mid, 3).tolist() == [1, -1, 2, -1, -1, -1]
    assert move_targets(mid, 10).tolist() == [-1] * 6


def test_calibration_and_class_results_by_hand() -> None:
    logits = np.log(np.array([[0.75, 0.25], [0.75, 0.25], [0.75, 0.25], [0.45, 0.55]]))
    classes = np.array([0, 0, 1, 1])
    found = calibration(logits, classes)
    assert [(row["low"], row["count"], row["found"]) for row in found.table] == [(0.5, 1, 1.0), (0.7, 3, 0.66667)]
    assert found.error == pytest.approx((0.45 + 3 * (0.75 - 2 / 3)) / 4, abs=1e-5)
    one, two = class_results(("a", "b", "c")[:2], logits, classes, np.array([1.0, 1.0, 2.0, 4.0]))
    assert (one["name"], one["count"], one["rival_bits"], one["recall"]) == ("a", 2, 1.0, 1.0)
    assert one["precision"] == pytest.approx(2 / 3, abs=1e-4)
    assert (two["recall"], two["precision"], two["rival_bits"]) == (0.5, 1.0, 3.0)
    assert two["bits"] == pytest.approx((2 - np.log2(0.55)) / 2, abs=1e-4)


def test_rivals_see_the_past_only() -> None:
    rng = np.random.default_rng(0)
    target = rng.exponential(3, 400)
    found = online_quantiles(target[:100], target[100:], (0.1, 0.5, 0.9))
    for i in (0, 7, 299):
        wanted = np.quantile(target[: 100 + i], (0.1, 0.5, 0.9), method="inverted_cdf")
        np.testing.assert_allclose(found[i], wanted, atol=0.03)
    classes, given = rng.integers(0, 3, 200), rng.integers(0, 2, 200)
    bits = online_class_bits(np.zeros((2, 0), np.int64), classes, 3, 5, given)
    np.testing.assert_allclose(bits[:5], np.log2(3))  # nothing is known before the first move has come true
    changed = classes.copy()
    changed[100:] = (changed[100:] + 1) % 3
    later = online_class_bits(np.zeros((2, 0), np.int64), changed, 3, 5, given)
    np.testing.assert_array_equal(later[:100], bits[:100])
    counts = np.bincount(classes[:95][given[:95] == given[99]], minlength=3) + 0.5
    assert bits[99] == pytest.approx(-np.log2(counts[classes[99]] / counts.sum()))


def test_pinball_is_least_at_the_quantile() -> None:
    target = np.random.default_rng(0).standard_normal(2000)
    losses = [pinball(np.full((2000, 1), q), target, (0.9,)).mean() for q in np.linspace(0, 3, 31)]
    assert np.linspace(0, 3, 31)[int(np.argmin(losses))] == pytest.approx(1.28, abs=0.15)
    np.testing.assert_allclose(pinball(np.array([[1.0], [1.0]]), np.array([3.0, 0.0]), (0.9,)), [1.8, 0.1])


# --- a real order book -----------------------------------------------------------------------------------------------

GOOG = Path(__file__).parents[2] / "shared" / "data" / "market" / "LOBSTER_SampleFile_GOOG_2012-06-21_1.zip"


@pytest.mark.skipif(not GOOG.is_file(), reason=f"no {GOOG.name}: LOBSTER samples may not be redistributed")
def test_an_order_book_is_learnt_in_one_short_pass() -> None:
    from streamattn.tape import load_tape

    tape = load_tape(f"lobster:{GOOG}").slice(0, 15_000)
    options = TrainOptions(layers=1, width=32, epochs=6, segments=4, chunk=64, heads=("next", "gap", "move"))
    checkpoint = train({"goog": tape}, options)
    again = train({"goog": tape}, options)
    for name, value in checkpoint.model.state_dict().items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, again.model.state_dict()[name]), name
    score = evaluate(checkpoint, tape)
    assert abs(score.bits_per_event - score.parallel_bits_per_event) < 1e-4
    assert score.bits_per_event < score.ngram_static_bits
    assert score.bits_per_event < score.ngram_online_bits
    assert score.heads["gap"]["pinball"] < min(score.heads["gap"]["rivals"].values())


def test_progress_is_reported_and_options_are_checked() -> None:
    seen: list[tuple[int, int, str]] = []
    train({"test:1": tape_of(1)}, dataclasses.replace(QUICK, epochs=1), lambda *args: seen.append(args))
    assert seen[-1][0] <= seen[-1][1]
    assert "bits" in seen[-1][2]
    with pytest.raises(ConfigError, match="fraction: expected between 0 and 1"):
        TrainOptions(fraction=1.5)
    with pytest.raises(ConfigError, match="epochs: expected >= 1, found 0"):
        TrainOptions(epochs=0)
    with pytest.raises(ConfigError, match="tapes: expected at least one"):
        train({}, QUICK)
    with pytest.raises(ConfigError, match="use fewer segments or shorter chunks, but a segment a tape"):
        train({"test:1": tape_of(1, 100)}, QUICK)


def test_event_bits_are_the_softmax_s() -> None:
    logits = np.random.default_rng(0).standard_normal((50, 4)) * 30
    ids = np.random.default_rng(1).integers(0, 4, 50)
    wanted = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(ids), reduction="none")
    np.testing.assert_allclose(event_bits(logits, ids), wanted.numpy() / np.log(2), rtol=0, atol=1e-12)


def test_the_shipped_model_keeps_its_promise() -> None:
    from streamattn.tape import load_tape

    folder = shipped_model("emini")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2_000_000
    checkpoint = load_checkpoint(folder)
    tape = load_tape("trades:emini")
    (trained,) = checkpoint.training["tapes"]
    assert trained["fingerprint"] == fingerprint(tape)
    assert trained["stop"] == int(0.7 * len(tape))
    score = evaluate(checkpoint, tape)
    assert score.start == trained["stop"]
    assert score.bits_per_event <= 0.80
    assert abs(score.bits_per_event - score.parallel_bits_per_event) < 1e-4
    _, online = best_online(tape.ids[: score.start + 1], tape.ids[score.start + 1 :], num_symbols=3)
    assert online.mean() == pytest.approx(score.ngram_online_bits, abs=1e-5)
    assert score.bits_per_event < score.ngram_online_bits - 0.05
