# Everything here works on a fresh machine: the first target that needs it makes .venv and installs into it.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: test lint

# All tests, without network; lint first, because it takes a second.
test: lint
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@
