"""Exports to Hugging Face and GGUF, each checked in the program that will run it."""
