"""The model: one GPT with many switches."""
