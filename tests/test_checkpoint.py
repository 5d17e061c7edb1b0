"""Checkpoints: an exact round trip, and a CheckpointError for everything that is not one."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_engine import FEATURES, VOCAB, expected_logits, random_events, small_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from streamattn.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, shipped_model
from streamattn.errors import CheckpointError
from streamattn.model import Head, ModelConfig, StreamTransformer
from streamattn.pattern import Global, Kernel, Pattern, Strided, Window
from streamattn.tape import FeatureSchema

SCHEMA = FeatureSchema(tuple("abcdefg"), ("x", "y", "z"), "test", 3)
PARTS = (Pattern(Window(4), Global(first=2, pinned=1), Strided(4, 3, 2), Kernel(8, 0.9, 5)), Pattern(Global(first=3)))
TRAINING = {"tapes": [{"spec": "test:1", "fingerprint": "ab", "start": 0, "stop": 9}], "seed": 3, "note": ["é", None]}


def a_model(dtype: torch.dtype = torch.float32) -> StreamTransformer:
    heads = (Head("next", "logits", VOCAB), Head("q", "quantiles", 3, (0.1, 0.5, 0.9)), Head("c", "classes", 2))
    shape = {"width": 12, "q_heads": 4, "kv_heads": 2, "head_dim": 6, "ffn": 10, "vocab": VOCAB, "features": FEATURES}
    torch.manual_seed(1)
    config = ModelConfig(PARTS, **shape, heads=heads, rope_theta=1e6, norm_eps=1e-6)
    return StreamTransformer(config, torch.randn(FEATURES), torch.rand(FEATURES) + 0.5).to(dtype)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder; not to be changed."""
    folder = tmp_path_factory.mktemp("good")
    save_checkpoint(Checkpoint(a_model(), SCHEMA, copy.deepcopy(TRAINING)), folder)
    return folder


def write(folder: Path, document: object, weights: bytes) -> Path:
    """Write a checkpoint whose digest fits, so that the check behind it is what must refuse."""
    folder.mkdir(exist_ok=True)
    if isinstance(document, dict) and "weights_sha256" in document:
        document["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    (folder / "model.json").write_text(json.dumps(document))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def parts(good: Path) -> tuple[dict[str, Any], bytes]:
    return json.loads((good / "model.json").read_bytes()), (good / "model.safetensors").read_bytes()


def same(a: StreamTransformer, b: StreamTransformer) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return list(mine) == list(theirs) and all(
        mine[n].dtype == theirs[n].dtype and torch.equal(mine[n], theirs[n]) for n in mine
    )


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_round_trip_is_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    model = a_model(dtype)
    save_checkpoint(Checkpoint(model, SCHEMA, TRAINING), tmp_path / "deep" / "folder")
    found = load_checkpoint(tmp_path / "deep" / "folder")
    assert same(found.model, model)
    assert found.model.config == model.config
    assert found.model.config.patterns == PARTS
    assert found.schema == SCHEMA
    assert found.training == TRAINING
    assert not found.model.training
    assert all(p.requires_grad for p in found.model.parameters())
    save_checkpoint(found, tmp_path / "again")
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "deep" / "folder" / name).read_bytes()


def test_a_loaded_model_answers_as_before_and_can_be_trained_on(tmp_path: Path) -> None:
    model = small_model()
    save_checkpoint(Checkpoint(model, SCHEMA), tmp_path)
    loaded = load_checkpoint(tmp_path).model
    ids, features = random_events(40)
    assert (expected_logits(loaded, ids, features) == expected_logits(model, ids, features)).all()
    loaded.final_norm(torch.ones(16)).sum().backward()
    assert loaded.final_norm.weight.grad is not None


def test_models_of_ids_or_features_alone(tmp_path: Path) -> None:
    for vocab, features, schema in (
        (2, 0, FeatureSchema(("a", "b"), (), "t", 1)),
        (0, 2, FeatureSchema((), ("x", "y"), "t", 1)),
    ):
        head = (Head("h", "classes", 2),)
        config = ModelConfig((Pattern(Window(2)),), 4, 1, 1, 4, 4, head, vocab=vocab, features=features)
        save_checkpoint(Checkpoint(model := StreamTransformer(config), schema), tmp_path)  # over the one before
        assert same(load_checkpoint(tmp_path).model, model)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be written: (Not a directory|File exists)"):
        save_checkpoint(Checkpoint(a_model(), SCHEMA), tmp_path / "file")


def test_the_shipped_model_loads() -> None:
    assert load_checkpoint(shipped_model("emini")).schema.codec == "trades"


# --- what is refused -------------------------------------------------------------------------------------------------


def test_missing_files(good: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model.json: cannot be read: No such file"):
        load_checkpoint(tmp_path / "nothing")
    (tmp_path / "model.json").write_bytes((good / "model.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read: No such file"):
        load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read: Is a directory"):
        load_checkpoint(tmp_path)


def test_every_flipped_bit_and_every_cut_is_found(good: Path, tmp_path: Path) -> None:
    _, weights = parts(good)
    (tmp_path / "model.json").write_bytes((good / "model.json").read_bytes())
    step = max(1, len(weights) // 50)
    damaged = [weights[:i] + bytes([weights[i] ^ 1 << i % 8]) + weights[i + 1 :] for i in range(0, len(weights), step)]
    damaged += [weights[:i] for i in range(0, len(weights), step)] + [weights + b"\0"]
    for data in damaged:
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match="damaged or belongs to another"):
            load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b'{"a":' * 100_000, "is no JSON"),
        (b"1" * 5_000, "is no JSON"),
        (b"[]", "expected a document of format 'streamattn-checkpoint'"),
        (b"{}", "expected a document of format 'streamattn-checkpoint'"),
        (b'{"format": ["streamattn-checkpoint"]}', "expected a document of format"),
        (b'{"format": "streamattn-checkpoint"}', "expected version 1, found None"),
        (b'{"format": "streamattn-checkpoint", "version": 2}', "expected version 1, found 2"),
        (b'{"format": "streamattn-checkpoint", "version": 1}', "missing required field"),
        (b'{"format": "streamattn-checkpoint", "version": 1, "more": 1}', "unknown field `more`"),
    ],
)
def test_a_document_of_another_kind(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "model.json").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 800


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Return a function that puts the last of `path` where the others lead."""

    def change(document: dict[str, Any]) -> None:
        at: Any = document
        for key in path[:-2]:
            at = at[key]
        at[path[-2]] = path[-1]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("model", "width", 13), "the weights do not fit model.json"),
        (_set("model", "width", 2**31 - 1), "the weights do not fit model.json"),
        (_set("model", "ffn", 2**31 - 1), "the weights do not fit model.json"),
        (_set("model", "width", 2**31), "<= 2147483647"),
        (_set("model", "width", 10**30), "$.model.width"),
        (_set("model", "width", 12.5), "Expected `int`, got `float` - at `$.model.width`"),
        (_set("model", "width", "12"), "Expected `int`, got `str` - at `$.model.width`"),
        (_set("model", "width", True), "Expected `int`, got `bool` - at `$.model.width`"),
        (_set("model", "head_dim", 2**31 - 2), "the weights do not fit model.json"),
        (_set("model", "head_dim", 7), "head_dim: expected an even number"),
        (_set("model", "q_heads", 3), "q_heads: expected a multiple of kv_heads"),
        (_set("model", "vocab", 8), "model.vocab: expected 7 as in the schema, found 8"),
        (_set("model", "features", 0), "model.features: expected 3 as in the schema, found 0"),
        (_set("model", "rope_theta", -1.0), "Expected `float` > 0.0 - at `$.model.rope_theta`"),
        (_set("model", "rope_theta", float("nan")), "$.model.rope_theta"),
        (_set("model", "norm_eps", float("inf")), "$.model.norm_eps"),
        (_set("model", "extra", 1), "unknown field `extra`"),
        (_set("model", "heads", []), "heads: expected at least one"),
        (_set("model", "heads", 0, "name", "next.weight"), "the weights do not fit model.json"),
        (_set("model", "heads", 0, "name", "keys"), "the weights do not fit model.json"),
        (_set("model", "heads", 0, "size", 2**31 - 1), "the weights do not fit model.json"),
        (_set("model", "heads", 0, "kind", "magic"), "Invalid enum value 'magic'"),
        (_set("model", "heads", 1, "levels", [0.9, 0.5, 0.1]), "rising levels"),
        (_set("model", "heads", 0, "hook", "os.system"), "unknown field `hook`"),
        (_set("model", "patterns", []), "patterns: expected one a layer"),
        (
            _set("model", "patterns", [[{"part": "window", "size": 4}]] * 100_000),
            "expected the weights of 100000 layers",
        ),
        (_set("model", "patterns", 0, []), "Pattern: expected at least one part"),
        (_set("model", "patterns", 0, 0, "part", "linear"), "pattern part: expected one of"),
        (_set("model", "patterns", 0, 0, "part", ["window"]), "model.json: "),
        (_set("model", "patterns", 0, 0, "size", "4"), "Window.size: expected >= 1, found '4'"),
        (_set("model", "patterns", 0, 0, "depth", 4), "unknown or missing option"),
        (_set("schema", "codec", 3), "feature schema: codec"),
        (_set("schema", {}), "feature schema: expected the keys"),
        (_set("schema", []), "$.schema"),
        (_set("training", []), "$.training"),
        (_set("training", "tapes", [{"spec": "test:1"}]), "missing required field `fingerprint`"),
        (_set("training", "tapes", 0, "stop", "9"), "Expected `int`, got `str`"),
        (_set("weights_sha256", 3), "$.weights_sha256"),
    ],
)
def test_a_document_that_lies(good: Path, tmp_path: Path, change: Callable[[dict], None], message: str) -> None:
    document, weights = parts(good)
    change(document)
    if "weights_sha256" in message:
        (tmp_path / "model.json").write_text(json.dumps(document))
    else:
        write(tmp_path, document, weights)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024  # kB


def test_weights_that_do_not_belong(good: Path, tmp_path: Path) -> None:
    document, data = parts(good)
    weights = load(data)
    one = "final_norm.weight"
    for changed, message in (
        ({k: v for k, v in weights.items() if k != one}, f'Missing key.*"{one}"'),
        ({**weights, "extra": torch.zeros(1)}, 'Unexpected key.*"extra"'),
        ({**weights, one: torch.zeros(3)}, "size mismatch for final_norm.weight"),
        ({**weights, one: weights[one].to(torch.float64)}, r"one floating dtype, found torch.float32, torch.float64"),
        ({k: v.to(torch.int32) for k, v in weights.items()}, "one floating dtype, found torch.int32"),
        ({}, "one floating dtype, found none"),
        ({"x": torch.zeros(1)}, "expected the weights of 2 layers, found those of 0"),
    ):
        write(tmp_path, document, save(changed))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_is_never_run(good: Path, tmp_path: Path) -> None:
    document, _ = parts(good)
    bomb = pickle.dumps(_Bomb(tmp_path / "boom"))
    torch.save(_Bomb(tmp_path / "boom"), tmp_path / "weights.pt")
    for data in (bomb, (tmp_path / "weights.pt").read_bytes()):
        write(tmp_path, document, data)
        with pytest.raises(CheckpointError, match="is no safetensors file"):
            load_checkpoint(tmp_path)
    assert not (tmp_path / "boom").exists()
    pickle.loads(bomb)
    assert (tmp_path / "boom").exists()  # the bomb was live


# --- mutations -------------------------------------------------------------------------------------------------------

_QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
_JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
    st.recursive(st.none(), lambda inner: st.lists(inner, max_size=2), max_leaves=20),
)


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path] * bool(path) + [place for key, child in children for place in _places(child, (*path, key))]


def loads_or_refuses(folder: Path) -> None:
    """Load; whatever is loaded must also run."""
    try:
        checkpoint = load_checkpoint(folder)
    except CheckpointError:
        return
    slots = sum(p.slots + (p.kernel.features if p.kernel else 0) for p in checkpoint.model.config.patterns)
    if slots < 10_000:
        ids, features = random_events(9)
        expected_logits(checkpoint.model.to(torch.float32), ids, features)


@_QUICK
@given(data=st.data())
def test_mutated_documents(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    document, weights = parts(good)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(_places(document)))
        at: Any = document
        for key in path[:-1]:
            at = at[key]
        if data.draw(st.booleans()):
            at[path[-1]] = data.draw(_JUNK)
        else:
            del at[path[-1]]
        if not _places(document):
            break
    loads_or_refuses(write(tmp_path, document, weights))


@_QUICK
@given(data=st.data())
def test_mutated_weights(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    document, weights = parts(good)
    header = int.from_bytes(weights[:8], "little") + 8
    changed = bytearray(weights)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, min(header, len(changed) - 1)))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del changed[data.draw(st.integers(0, len(changed))) :]
    loads_or_refuses(write(tmp_path, document, bytes(changed)))


@_QUICK
@given(text=st.binary(max_size=200))
def test_arbitrary_bytes(good: Path, tmp_path: Path, text: bytes) -> None:
    document, _ = parts(good)
    loads_or_refuses(write(tmp_path, document, text))
    (tmp_path / "model.json").write_bytes(text)
    loads_or_refuses(tmp_path)
