"""The model: one GPT with many switches."""

from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import GPT
from tinygpt.model.weights import load_model

__all__ = ["GPT", "GPTConfig", "load_model"]
