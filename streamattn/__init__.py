"""streamattn: sparse attention with exact semantics on token streams that never end.

The public names are loaded when they are first used, so that commands and transports that need no model do not import
PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from streamattn.async_engine import AsyncEngine, AsyncStream
    from streamattn.batch import Policy
    from streamattn.cache import StreamCache
    from streamattn.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, shipped_model
    from streamattn.engine import Engine, Outcome, Stream
    from streamattn.errors import StreamattnError
    from streamattn.frame import Control, Fault, Frame, Heartbeat, Reply, Result
    from streamattn.model import Head, Inputs, ModelConfig, StreamTransformer
    from streamattn.pattern import Global, Kernel, Pattern, Strided, Window
    from streamattn.runtime import Runtime
    from streamattn.scheduler import Scheduler

_PLACES = {
    "async_engine": ("AsyncEngine", "AsyncStream"),
    "cache": ("StreamCache",),
    "checkpoint": ("Checkpoint", "load_checkpoint", "save_checkpoint", "shipped_model"),
    "engine": ("Engine", "Outcome", "Stream"),
    "errors": ("StreamattnError",),
    "frame": ("Control", "Fault", "Frame", "Heartbeat", "Reply", "Result"),
    "model": ("Head", "Inputs", "ModelConfig", "StreamTransformer"),
    "pattern": ("Global", "Kernel", "Pattern", "Strided", "Window"),
    "runtime": ("Runtime",),
    "batch": ("Policy",),
    "scheduler": ("Scheduler",),
}
_HOMES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "AsyncEngine",
    "AsyncStream",
    "Checkpoint",
    "Control",
    "Engine",
    "Fault",
    "Frame",
    "Global",
    "Head",
    "Heartbeat",
    "Inputs",
    "Kernel",
    "ModelConfig",
    "Outcome",
    "Pattern",
    "Policy",
    "Reply",
    "Result",
    "Runtime",
    "Scheduler",
    "Stream",
    "StreamCache",
    "StreamTransformer",
    "StreamattnError",
    "Strided",
    "Window",
    "__version__",
    "load_checkpoint",
    "save_checkpoint",
    "shipped_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'streamattn' has no attribute {name!r}")
    return getattr(import_module(f"streamattn.{_HOMES[name]}"), name)
