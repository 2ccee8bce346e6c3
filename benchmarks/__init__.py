"""Measurements next to others, each a command: `python -m benchmarks.<name>`."""

from tinygpt import threads  # before PyTorch, which a benchmark imports first

__all__ = ["threads"]
