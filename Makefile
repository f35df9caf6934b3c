# `make demo` and `make test` set up .venv on first use and need no network afterwards.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-fast test-slow check clean help

help: ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## build the embedded cache and train a student from it
	TEACHER_CACHE_HOME=$${TEACHER_CACHE_HOME:-runs/demo/caches} $(BIN)/build-cache
	TEACHER_CACHE_HOME=$${TEACHER_CACHE_HOME:-runs/demo/caches} $(BIN)/train-student

# One worker more than there are cores: many tests wait for processes and servers that they have started.
PYTEST = $(BIN)/pytest -n $(shell $(PYTHON) -c "import os; print(os.cpu_count() + 1)") --dist worksteal

test: check ## static checks, and all tests but those marked `slow`
	$(PYTEST) -m "not slow"

test-fast: $(STAMP) ## before each commit: the tests that take no second, without `medium`, `turns` and `slow`
	$(PYTEST) -m "not medium and not turns and not slow"

test-slow: $(STAMP) ## the tests marked `slow`, and the long turn of those marked `turns`
	TEACHER_CACHE_LONG_TESTS=1 $(PYTEST) -m "slow or turns"

check: $(STAMP) ## ruff, mypy, import contracts, hadolint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

clean: ## remove the environment and everything the demo made
	rm -rf $(VENV) runs/demo
