"""From raw text to a small GPT that llama.cpp runs, reproducibly."""
