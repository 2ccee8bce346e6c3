"""How good a model is: numbers on held-out text, and samples."""
