"""streamattn: sparse attention with exact semantics on token streams that never end."""

__version__ = "0.1.0"
