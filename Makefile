# CI and people call the same targets. VENV may name an existing environment.
PYTHON ?= python3
VENV ?= .venv
PYTHON_OLDEST ?= python3.11
PYTHON_NEWEST ?= python3.13
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.tools
SPHINX := $(VENV)/.sphinx

.PHONY: help setup tools fmt lint test test-fast test-oldest test-newest fuzz soak docs demo bench bench-gpu gpu-program clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(INSTALLED)  ## virtual environment with vaecf

tools: $(TOOLS)  ## the same with what lint and tests need

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(TOOLS): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $(INSTALLED) $@

fmt: tools  ## format in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: tools  ## style, names, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint  ## everything, under 12 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --dist worksteal
	XLA_FLAGS= $(BIN)/python -m pytest -n 2 --dist loadgroup tests/real_settings

test-fast: tools  ## without the slow tests
	$(BIN)/python -m pytest -n 2 -m 'not slow'

# The lowest version of every direct dependency, on the oldest Python.
test-oldest:  ## all tests with the oldest supported Python and packages
	$(PYTHON_OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct --editable '.[test]'
	.venv-oldest/bin/python -m pytest -n 2

test-newest:  ## all tests with the newest supported Python and packages
	$(PYTHON_NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --editable '.[test]'
	.venv-newest/bin/python -m pytest -n 2

fuzz: tools  ## long: INPUTS=1000000 SEED=0 damaged and strange inputs of all readers
	$(BIN)/python tests/fuzz/harness.py --inputs=$(or $(INPUTS),1000000) --seed=$(or $(SEED),0)

soak: tools  ## long: KILLS=120 SEED=0 kills of all commands at random moments
	$(BIN)/python tests/soak/kills.py --kills=$(or $(KILLS),120) --seed=$(or $(SEED),0)

docs: $(SPHINX)  ## the documentation, in build/docs; a dead link is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

$(SPHINX): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

demo: setup  ## generated data, a trained model, recommendations, a report
	$(BIN)/python experiments/demo.py --workdir=runs/demo

bench: setup  ## training speed on this machine
	$(BIN)/python experiments/benchmark/training.py --json=experiments/benchmark/results/training-local.json

bench-gpu:  ## all that is measured on a GPU; its own python3, no installation
	sh experiments/benchmark/gpu.sh $(or $(OUT),experiments/benchmark/results)

gpu-program: .venv-gpu  ## GPU programs compiled and read without a GPU; DEVICES="h100 h200"
	for device in $(or $(DEVICES),a100 h100 h200); do \
	  .venv-gpu/bin/python experiments/benchmark/gpu_program.py --device=$$device \
	    --json=$(or $(OUT),experiments/benchmark/results)/gpu_program-$$device.json || exit 1; \
	done

.venv-gpu: pyproject.toml  # about 5 GB
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[cuda12]'
	@touch .venv-gpu

clean:  ## what was built here; data/ and runs/ stay
	rm -rf $(VENV) .venv-gpu .venv-oldest .venv-newest build dist docs/_generated docs/_notebooks .pytest_cache .ruff_cache .mypy_cache .hypothesis
