"""Checkpoints: a folder with `model.json` (shape, schema, how it was trained) and `model.safetensors` (weights).

Nothing in it is ever executed: JSON and safetensors only.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from streamattn.errors import CheckpointError, ConfigError
from streamattn.model import ModelConfig, StreamTransformer, head_from_config
from streamattn.pattern import Pattern
from streamattn.tape import FeatureSchema

FORMAT = "streamattn-checkpoint"
VERSION = 1
_SHAPE = ("width", "q_heads", "kv_heads", "head_dim", "ffn", "vocab", "features", "rope_theta", "norm_eps")


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


def save_checkpoint(checkpoint: Checkpoint, folder: str | Path) -> None:
    """Write a checkpoint folder; an existing one is replaced file by file, weights first."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    weights = save({name: value.contiguous() for name, value in checkpoint.model.state_dict().items()})
    config = checkpoint.model.config
    document = {
        "format": FORMAT,
        "version": VERSION,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "model": {
            **{name: getattr(config, name) for name in _SHAPE},
            "heads": [asdict(head) for head in config.heads],
            "patterns": [pattern.to_config() for pattern in config.patterns],
        },
        "schema": checkpoint.schema.to_dict(),
        "training": checkpoint.training,
    }
    _replace(path / "model.safetensors", weights)
    _replace(path / "model.json", json.dumps(document, indent=1).encode() + b"\n")


def load_checkpoint(folder: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Return the checkpoint in a folder.

    Raises:
        CheckpointError: it is missing, damaged, of another version, or its parts do not belong together.
    """
    path = Path(folder)
    document = _read_document(path / "model.json")
    try:
        weights = (path / "model.safetensors").read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: model.safetensors cannot be read: {error.strerror}") from None
    if hashlib.sha256(weights).hexdigest() != document.get("weights_sha256"):
        raise CheckpointError(f"{path}: model.safetensors is damaged or belongs to another model.json; fetch it again")
    try:
        config = _config(document["model"])
        schema = FeatureSchema.from_dict(document["schema"])
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}/model.json: {error}") from None
    model = StreamTransformer(config)
    try:
        model.load_state_dict(load(weights))
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the weights do not fit model.json: {str(error)[:300]}") from None
    return Checkpoint(model.to(device).eval(), schema, document.get("training", {}))


def shipped_model(name: str = "emini") -> Path:
    """Return the folder of a model that comes with the package."""
    return Path(__file__).parent / "models" / name


def _config(data: dict[str, Any]) -> ModelConfig:
    unknown = set(data) - {*_SHAPE, "heads", "patterns"}
    if unknown:
        raise ConfigError(f"model: unknown entries {sorted(unknown)}")
    return ModelConfig(
        patterns=tuple(Pattern.from_config(parts) for parts in data["patterns"]),
        heads=tuple(head_from_config(head) for head in data["heads"]),
        **{name: data[name] for name in _SHAPE},
    )


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; expected a folder written by `streamattn train --out`"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON: {str(error)[:200]}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected a document of format {FORMAT!r}")
    if document.get("version") != VERSION:
        raise CheckpointError(f"{path}: expected version {VERSION}, found {document.get('version')!r}")
    return document


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
