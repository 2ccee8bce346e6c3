"""One small program a stage, run as `python -m stages.<name>`."""

from tinygpt import threads  # before PyTorch, which a stage may import first

__all__ = ["threads"]
