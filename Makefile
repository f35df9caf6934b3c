# `make demo` and `make test` set up .venv on first use and need no network afterwards.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check clean help

help: ## list these targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## build the embedded cache and train a student from it
	TEACHER_CACHE_HOME=$${TEACHER_CACHE_HOME:-runs/demo/caches} $(BIN)/build-cache
	TEACHER_CACHE_HOME=$${TEACHER_CACHE_HOME:-runs/demo/caches} $(BIN)/train-student

# One worker more than there are cores: many tests wait for processes and servers that they have started.
test: check ## static checks and the test suite
	$(BIN)/pytest -n $(shell $(PYTHON) -c "import os; print(os.cpu_count() + 1)") --dist loadfile --no-loadscope-reorder

check: $(STAMP) ## ruff, mypy, import contracts, hadolint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

clean: ## remove the environment and everything the demo made
	rm -rf $(VENV) runs/demo
