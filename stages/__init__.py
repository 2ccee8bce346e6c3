"""One small program for each stage, run as `python -m stages.<name>`."""

import sys

from tinygpt import threads  # must come before PyTorch, which a stage may import first
from tinygpt.errors import leave_at_once

__all__ = ["threads"]

if sys.argv[0] == "-m":  # `python -m` is about to run a stage
    leave_at_once()
