# Everything runs in .venv, which is made from the lock on first use. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test test-all chaos lint format lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## make the environment from requirements.lock

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

demo: $(READY) ## run every stage on drawn scenes; writes demo/
	$(BIN)/goal-ray demo

test: $(READY) ## the test suite, tests with Ray after the others (12 to 20 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not ray"
	$(BIN)/python -m pytest -m "not slow and ray"

test-all: $(READY) ## also the tests that take minutes each
	$(BIN)/python -m pytest -m ''

chaos: $(READY) ## kill nodes, drivers and storage of a cluster on this machine; prints how long each recovery took
	$(BIN)/python -m pytest -m '' -s tests/cluster/test_chaos.py

lint: $(READY) ## formatting, rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(READY) ## renew requirements.lock from pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --upgrade --extra dev --python-version 3.11 --no-header --no-annotate \
		--output-file requirements.lock pyproject.toml

clean: ## remove the environment and the demo's output
	rm -rf $(VENV) demo
