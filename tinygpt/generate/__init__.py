"""Text from a model."""

from tinygpt.generate.answer import Answer
from tinygpt.generate.options import Sampling, Search
from tinygpt.generate.speculative import Speculation
from tinygpt.generate.stream import generate, generate_batch, stream

__all__ = ["Answer", "Sampling", "Search", "Speculation", "generate", "generate_batch", "stream"]
