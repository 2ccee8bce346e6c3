"""The paths of the data: where each stage writes, relative to the project's top folder."""

from pathlib import Path

RAW = Path("data/raw")
CLEAN = Path("data/clean")
TOKENIZER = Path("data/tokenizer")
TOKENIZER_FILE = "tokenizer.json"  # in that folder, and in one with a model
TOKENS = Path("data/tokens")
BASE = Path("data/base")
MODEL = Path("data/model")
EXPORT = Path("data/export")
REPORTS = Path("reports")
PLOTS = REPORTS / "plots"
CODE = REPORTS / "code.json"
PAGE = REPORTS / "index.html"
