"""One small program for each stage, run as `python -m stages.<name>`."""

import sys

from tinygpt import threads  # before PyTorch, which a stage may import first
from tinygpt.errors import leave_at_once

__all__ = ["threads"]

if sys.argv[0] == "-m":  # a stage is about to be imported as the program
    leave_at_once()
