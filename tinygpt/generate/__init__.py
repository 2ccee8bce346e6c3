"""Text from a model."""

from tinygpt.generate.stream import generate, stream

__all__ = ["generate", "stream"]
