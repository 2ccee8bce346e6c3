"""Text from a model."""

from tinygpt.generate.answer import Answer
from tinygpt.generate.speculative import Speculation
from tinygpt.generate.stream import generate, generate_batch, stream
from tinygpt.options import Sampling, Search

__all__ = ["Answer", "Sampling", "Search", "Speculation", "generate", "generate_batch", "stream"]
