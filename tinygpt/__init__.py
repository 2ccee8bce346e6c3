"""From raw text to a small GPT that llama.cpp runs, reproducibly."""

from tinygpt import threads

__all__ = ["threads"]
