# Two commands set everything up: `make demo` and `make test`. README.md has the same as plain commands.
# `make fuzz` tries spoilt files and options for ten minutes and says how many of each kind; not part of the tests' gate.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo lint test test-slow test-oldest fuzz gpu-check install

demo: install
	$(BIN)/python -m pipeline.demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pipeline models data

test: install
	$(BIN)/python -m pytest -q -n auto -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -q -n auto -m slow

# the default tests with the oldest versions that setup.cfg allows, in an environment of its own
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -e ".[test]" -c tests/oldest.txt
	.venv-oldest/bin/python -m pytest -q -n auto -m "not slow"

fuzz: install
	ONCEOVER_FUZZ_SECONDS=600 $(BIN)/python -m pytest -q -s tests/test_fuzz.py

# the tests that need a GPU and the benchmarks on it, in under nine minutes: docs/guide.md
gpu-check: install
	-$(BIN)/python -m pip install -e ".[bench]"
	$(BIN)/python -m benchmarks.gpu_check

install: .venv/installed

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e ".[test]"
	touch .venv/installed
