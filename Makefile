PYTHON ?= python3
VENV := .venv
RUNTIME := $(VENV)/requirements.installed
DEV := $(VENV)/requirements-dev.installed
export PATH := $(abspath $(VENV))/bin:$(PATH)
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n auto --durations=25

.DEFAULT_GOAL := help
.PHONY: help install repro test lint typecheck format check coverage sample clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(RUNTIME) ## Make .venv and install requirements.txt

repro: $(RUNTIME) ## Run the whole pipeline: text, tokenizer, model, evaluation, plots, exports
	@git rev-parse --git-dir >/dev/null 2>&1 || { \
		echo "error: this folder is no git repository (a ZIP download?), and DVC needs one. Clone it, or run:" >&2; \
		echo "    git init && git add . && git commit -m 'Start'" >&2; exit 1; }
	dvc repro

test: $(DEV) ## Run the test suite
	$(PYTEST)

lint: $(DEV) ## Check style with ruff
	ruff check .
	ruff format --check .

typecheck: $(DEV) ## Check types with mypy
	mypy

format: $(DEV) ## Put the code in ruff's format
	ruff format .
	ruff check --fix .

check: lint typecheck test ## lint, typecheck and test

coverage: $(DEV) ## Run the tests and tell which lines none of them runs
	$(PYTEST) --cov=tinygpt --cov=stages --cov-report=term-missing:skip-covered

sample: $(RUNTIME) ## Let the trained model write
	python -m tinygpt generate --max-new-tokens 200

clean: ## Remove .venv, the data, the runs and all that was made (not DVC's cache)
	rm -rf $(VENV) runs reports/plots reports/samples.md reports/train_samples.md \
		reports/attention.* reports/tokenizer.png dvc_plots htmlcov .coverage
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find data -mindepth 1 ! -path data/README.md ! -path data/base ! -path data/base/README.md -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUNTIME): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "error: $(PYTHON) must be Python 3.11 to 3.13: say which with  make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(DEV): requirements-dev.txt $(RUNTIME)
	python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
