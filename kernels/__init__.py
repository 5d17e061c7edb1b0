"""Attention operations of the engine: the specification in plain PyTorch, and Triton kernels where a GPU is active."""

__version__ = "0.1.0"
