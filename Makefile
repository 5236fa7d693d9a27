# Every target is one line that CI and people call alike. VENV may point at an
# environment that exists already.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.tools

.PHONY: help setup tools fmt lint test test-fast demo bench bench-gpu clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(INSTALLED)  ## virtual environment with vaecf

tools: $(TOOLS)  ## the same with what lint and tests need

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(TOOLS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

fmt: tools  ## format in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: tools  ## style, names, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint  ## everything, under 12 minutes on 2 cores
	$(BIN)/python -m pytest -n 2

test-fast: tools  ## without the slow tests
	$(BIN)/python -m pytest -n 2 -m 'not slow'

demo: setup  ## generated data, a trained model, recommendations, a report
	$(BIN)/python experiments/demo.py --workdir=runs/demo

bench: setup  ## training speed on this machine
	$(BIN)/python experiments/benchmark/training.py --json=experiments/benchmark/results/training-local.json

bench-gpu:  ## all that is measured on a GPU; its own python3, no installation
	python3 experiments/benchmark/gpu.py --json=$(or $(OUT),experiments/benchmark/results)/gpu.json

clean:  ## what was built here; data/ and runs/ stay
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
