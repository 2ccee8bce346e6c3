"""A server with OpenAI's API for completions, and a page to play with models.  Needs requirements-serve.txt."""
