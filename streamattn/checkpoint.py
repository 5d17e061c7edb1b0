"""Checkpoints: a folder with `model.json` (shape, schema, how it was trained) and `model.safetensors` (weights).

Nothing in it is ever executed: JSON and safetensors only. Nothing in it is believed either: types are checked, and the
shape is compared with the weights that are there before any memory is taken for it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from streamattn.errors import CheckpointError, ConfigError
from streamattn.model import Head, HeadKind, ModelConfig, StreamTransformer
from streamattn.pattern import Pattern
from streamattn.tape import FeatureSchema

FORMAT = "streamattn-checkpoint"
VERSION = 1
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """A model with what is needed to feed it.

    Attributes:
        model: weights and shape.
        schema: names of its ids and features, and the codec that makes them.
        training: what it was trained on: tape, range of events, seed, command, scores.
    """

    model: StreamTransformer
    schema: FeatureSchema
    training: dict[str, Any] = field(default_factory=dict)


# --- model.json, typed -----------------------------------------------------------------------------------------------

_Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Number = Annotated[float, Meta(gt=0, le=1e30)]


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _HeadEntry(_Strict):
    name: Annotated[str, Meta(min_length=1, max_length=64)]
    kind: HeadKind
    size: _Size
    levels: tuple[float, ...] = ()


class _ModelEntry(_Strict):
    width: _Size
    q_heads: _Size
    kv_heads: _Size
    head_dim: _Size
    ffn: _Size
    vocab: _Count
    features: _Count
    rope_theta: _Number
    norm_eps: _Number
    heads: list[_HeadEntry]
    patterns: list[list[dict[str, Any]]]

    def config(self) -> ModelConfig:
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        heads = tuple(Head(h.name, h.kind, h.size, h.levels) for h in self.heads)
        patterns = tuple(Pattern.from_config(parts) for parts in self.patterns)
        return ModelConfig(**{**values, "heads": heads, "patterns": patterns})


class _TapeEntry(msgspec.Struct):
    spec: str
    fingerprint: str
    start: Annotated[int, Meta(ge=0)]
    stop: Annotated[int, Meta(ge=0)]


class _TrainingEntry(msgspec.Struct):
    """What others read of `training`; it may hold anything else besides."""

    tapes: list[_TapeEntry] = []


class _Document(_Strict):
    format: str
    version: int
    weights_sha256: str
    model: _ModelEntry
    schema: dict[str, Any]
    training: dict[str, Any]


# --- save and load ---------------------------------------------------------------------------------------------------


def save_checkpoint(checkpoint: Checkpoint, folder: str | Path) -> None:
    """Write a checkpoint folder; an existing one is replaced file by file, weights first.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    path = Path(folder)
    weights = save({name: value.contiguous() for name, value in checkpoint.model.state_dict().items()})
    config = checkpoint.model.config
    shape = {name: getattr(config, name) for name in _ModelEntry.__struct_fields__}
    document = {
        "format": FORMAT,
        "version": VERSION,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "model": {
            **shape,
            "heads": [asdict(head) for head in config.heads],
            "patterns": [pattern.to_config() for pattern in config.patterns],
        },
        "schema": checkpoint.schema.to_dict(),
        "training": checkpoint.training,
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        _replace(path / "model.safetensors", weights)
        _replace(path / "model.json", json.dumps(document, indent=1).encode() + b"\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from None


def load_checkpoint(folder: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Return the checkpoint in a folder, with the dtype it was saved in.

    Raises:
        CheckpointError: it is missing, damaged, of another version, or its parts do not belong together.
    """
    path = Path(folder)
    document = _read_document(path / "model.json")
    try:
        config = document.model.config()
        schema = FeatureSchema.from_dict(document.schema)
        _check_schema(config, schema)
        msgspec.convert(document.training, _TrainingEntry)
    except (ConfigError, TypeError, msgspec.ValidationError) as error:
        raise CheckpointError(f"{path}/model.json: {_brief(error)}") from None
    model = _model(path, config, _read_weights(path, document.weights_sha256))
    return Checkpoint(model.to(device).eval(), schema, document.training)


def shipped_model(name: str = "emini") -> Path:
    """Return the folder of a model that comes with the package."""
    return Path(__file__).parent / "models" / name


def _read_document(path: Path) -> _Document:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; expected a folder written by `streamattn train --out`"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON: {_brief(error)}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected a document of format {FORMAT!r}, found something else")
    if found.get("version") != VERSION:
        raise CheckpointError(f"{path}: expected version {VERSION}, found {_brief(repr(found.get('version')))}")
    try:
        return msgspec.convert(found, _Document)
    except (msgspec.ValidationError, RecursionError) as error:
        raise CheckpointError(f"{path}: {_brief(error)}") from None


def _check_schema(config: ModelConfig, schema: FeatureSchema) -> None:
    for name, size, names in (("vocab", config.vocab, schema.symbols), ("features", config.features, schema.features)):
        if size != len(names):
            raise ConfigError(f"model.{name}: expected {len(names)} as in the schema, found {size}")


def _read_weights(path: Path, digest: str) -> dict[str, Tensor]:
    try:
        data = (path / "model.safetensors").read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: model.safetensors cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(f"{path}: model.safetensors is damaged or belongs to another model.json; fetch it again")
    try:
        weights = load(data)
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: model.safetensors is no safetensors file: {_brief(error)}") from None
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        found = ", ".join(sorted(map(str, dtypes))) or "none"
        raise CheckpointError(f"{path}: model.safetensors: expected weights of one floating dtype, found {found}")
    return weights


def _model(path: Path, config: ModelConfig, weights: dict[str, Tensor]) -> StreamTransformer:
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.") and name.count(".") > 1})
    if layers != config.layers:  # first, as an empty layer costs time and memory, too
        raise CheckpointError(f"{path}: expected the weights of {config.layers} layers, found those of {layers}")
    try:
        with torch.device("meta"):  # shapes only
            model = StreamTransformer(config)
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: the weights do not fit model.json: {_brief(error)}") from None
    return model


def _brief(error: object) -> str:
    return str(error).replace("\n", " ")[:300]


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
