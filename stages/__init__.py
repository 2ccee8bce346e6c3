"""One small program a stage, run as `python -m stages.<name>`."""
