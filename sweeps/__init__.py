"""Searches for good params, driven from outside the pipeline."""
