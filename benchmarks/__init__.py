"""Measurements beside others, each a command: `python -m benchmarks.<name>`."""
