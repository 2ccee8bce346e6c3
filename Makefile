PYTHON ?= python3
VENV := .venv
RUNTIME := $(VENV)/requirements.installed# it says where .venv was made
DEV := $(VENV)/requirements-dev.installed
export PATH := $(abspath $(VENV))/bin:$(PATH)
TORCH :=# cpu, or another build that https://download.pytorch.org/whl has, such as cu126
TORCH_INDEX := https://download.pytorch.org/whl/$(TORCH)
PIP := python -m pip install --disable-pip-version-check
N := 50000
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n auto --durations=25

.DEFAULT_GOAL := help
.PHONY: help install repro train eval shakespeare test fuzz lint typecheck format check coverage sample notebooks clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(RUNTIME) ## Make .venv and install requirements.txt (TORCH=cpu: PyTorch without CUDA)

repro: $(RUNTIME) ## Run the whole pipeline: text, tokenizer, model, evaluation, plots, exports
	@said=$$(LC_ALL=C git rev-parse --git-dir 2>&1) || { \
		echo "error: DVC needs a git repository, and git says here: $$said" >&2; \
		case "$$said" in *"not a git repository"*) \
		echo "A ZIP download? Clone it, or run:  git init && git add . && git commit -m 'Start'" >&2;; esac; exit 1; }
	@python -m tinygpt mend
	dvc repro $(STAGE)

train: ## Run it as far as the trained model
	@$(MAKE) --no-print-directory repro STAGE=train

eval: ## Run it as far as the evaluation
	@$(MAKE) --no-print-directory repro STAGE=evaluate

shakespeare: $(RUNTIME) ## Train on tiny Shakespeare, in the folder shakespeare/, and let the model write
	python -m quickstart shakespeare
	@echo "nanoGPT on the same text and split, in its README: 1.88 in 3 minutes on a CPU, 1.4697 on an A100"
	python -m tinygpt generate --model shakespeare/data/model --prompt "ROMEO:" --temperature 0.8 --max-new-tokens 400

test: $(DEV) ## Run the test suite
	$(PYTEST)

fuzz: $(DEV) ## Damage N=50000 files, kill stages and DVC 200 times, fill disks: two hours
	PYTHONPATH=. OMP_NUM_THREADS=1 python tests/fuzz.py $(N)
	TINYGPT_FUZZ=20 OMP_NUM_THREADS=1 python -m pytest --timeout 7200 tests/test_kills.py tests/test_full_disk.py

lint: $(DEV) ## Check style with ruff
	ruff check .
	ruff format --check .

typecheck: $(DEV) ## Check types with mypy
	mypy

format: $(DEV) ## Put the code in ruff's format
	ruff format .
	ruff check --fix .

check: lint typecheck test ## lint, typecheck and test

coverage: $(DEV) ## Run the tests and list the lines that none of them runs
	$(PYTEST) --cov=tinygpt --cov=stages --cov-report=term-missing:skip-covered

sample: $(RUNTIME) ## Let the trained model write
	@[ -e data/model ] || { echo "error: there is no model yet: run  make repro  first" >&2; exit 1; }
	python -m tinygpt generate --max-new-tokens 200

notebooks: $(DEV) ## Run notebooks/ and write them as pages, with outputs, into reports/notebooks/
	python -m nbconvert --execute --to html --output-dir reports/notebooks notebooks/*.ipynb

clean: ## Remove .venv, the data, the runs and all that was made (not DVC's cache)
	rm -rf $(VENV) runs quickstart shakespeare shakespeare-best reports/notebooks reports/plots reports/*.html reports/details.json reports/samples.md reports/train_samples.md \
		reports/clean.json reports/train.json reports/eval.json reports/export.json \
		reports/attention.* reports/tokenizer.png dvc_plots htmlcov .coverage
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find data -mindepth 1 ! -path data/README.md -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Programs in .venv/bin know where it is and where its Python is: after a move they do not start.
ifneq ($(wildcard $(RUNTIME)),)
ifneq ($(shell $(VENV)/bin/python -c '' && { [ ! -s $(RUNTIME) ] || [ "$$(cat $(RUNTIME))" = "$$(cd $(VENV) && pwd -P)" ]; } && echo here),here)
MOVED := yes
.PHONY: $(RUNTIME)
endif
endif

$(RUNTIME): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "error: $(PYTHON) must be Python 3.11 to 3.13: say which with  make PYTHON=python3.12" >&2; exit 1; }
ifdef MOVED
	@echo "$(VENV) was made in another folder or by a Python that is gone: it is made again"
endif
	$(PYTHON) -m venv $(if $(MOVED),--clear) $(VENV)
ifneq ($(TORCH),)
	$(PIP) --retries 1 --timeout 15 --index-url $(TORCH_INDEX) "$$(grep -o '^torch==[0-9.]*' requirements.txt)" || \
		echo "note: no PyTorch from $(TORCH_INDEX): going on with the one that pip finds" >&2
else
	@[ "$$(uname -sm)" != "Linux x86_64" ] || [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null || { \
		echo "note: there is no NVIDIA driver here, and PyTorch from PyPI brings 5 GB of CUDA for one. Its build for CPUs" >&2; \
		echo "    (a tenth of that, from pytorch.org) computes the same: press Ctrl-C and run  make repro TORCH=cpu" >&2; }
endif
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --editable . || echo "note: the command tinygpt is not installed; python -m tinygpt works here" >&2
	@(cd $(VENV) && pwd -P) > $@

$(DEV): $(wildcard requirements-*.txt) $(RUNTIME)
	$(PIP) -r requirements-dev.txt
	@touch $@
