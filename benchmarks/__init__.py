"""Measurements, most of them next to other programs; each is a command: `python -m benchmarks.<name>`."""

from tinygpt import threads  # must come before PyTorch, which a benchmark may import first

__all__ = ["threads"]
