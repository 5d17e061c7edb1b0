"""Transports. Each module has a source and a sink; `open_source` and `open_sink` choose one by its URL."""

__version__ = "0.1.0"
