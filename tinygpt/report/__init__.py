"""Measurements, charts and pages of a run."""
