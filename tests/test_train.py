"""Training and scoring: it learns, it is repeatable, streaming and parallel scores agree, overlap is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from streamattn.checkpoint import Checkpoint, load_checkpoint, shipped_model
from streamattn.errors import ConfigError
from streamattn.ngram import best_online
from streamattn.scores import event_bits
from streamattn.tape import FeatureSchema, Tape
from streamattn.train import TrainOptions, evaluate, fingerprint, parallel_bits, streaming_bits, train

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
    with pytest.raises(ConfigError, match="use fewer segments or shorter chunks"):
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
