# Every target is one line that CI and people call alike. VENV may point at an
# environment that exists already.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup fmt lint test test-fast demo bench bench-gpu clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(STAMP)  ## virtual environment with vaecf and its tools

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $(STAMP)

fmt: setup  ## format in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup  ## style, names, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint  ## everything, under 12 minutes on 2 cores
	$(BIN)/python -m pytest -n 2

test-fast: setup  ## without the slow tests
	$(BIN)/python -m pytest -n 2 -m 'not slow'

demo: setup  ## generated data, a trained model, recommendations, a report
	$(BIN)/python experiments/demo.py --workdir=runs/demo

bench: setup  ## training speed on this machine
	$(BIN)/python experiments/benchmark/training.py --json=experiments/benchmark/results/training-local.json

bench-gpu:  ## on a machine with a GPU, its own python3 and no installation
	python3 experiments/benchmark/training.py --precision=bf16 --batch_size=24576 --json=experiments/benchmark/results/training-gpu.json

clean:  ## what was built here; data/ and runs/ stay
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
