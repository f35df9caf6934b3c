# `make demo` and `make test` set up .venv on first use and need no network afterwards.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := dev,examples

OLDEST := .venv-oldest

# The tests start hundreds of processes. Each would compile our modules again, and pytest would rewrite every test file.
unexport PYTHONDONTWRITEBYTECODE

# Compile on all cores, which pip does on one. Tests of packages are left out, and files for other Pythons do not compile.
define install
$(1)/bin/python -m pip install --quiet --no-compile $(2)
-$(1)/bin/python -m compileall -qq -j 0 -x '/tests?/' $(1)/lib
endef

.PHONY: demo gpu test run-tests test-fast test-slow test-oldest constraints-oldest check docs dist clean help

help: ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(call install,$(VENV),--editable '.[$(EXTRAS)]')
	@touch $@

demo: $(STAMP) ## build the embedded cache and train a student from it
	TEACHER_CACHE_HOME=$${TEACHER_CACHE_HOME:-runs/demo/caches} $(BIN)/build-cache
	TEACHER_CACHE_HOME=$${TEACHER_CACHE_HOME:-runs/demo/caches} $(BIN)/train-student

# One worker more than there are cores: many tests wait for processes and servers that they have started.
PYTEST = $(BIN)/pytest -n $(shell $(PYTHON) -c "import os; print(os.cpu_count() + 1)") --dist worksteal

# Together, because mypy uses one core.
test: $(STAMP) ## static checks, and all tests but those marked `slow`
	$(MAKE) --jobs=2 check run-tests

run-tests: $(STAMP)
	$(PYTEST) -m "not slow"

test-fast: $(STAMP) ## before each commit: the tests that take under a second, which have no marker `medium`, `turns` or `slow`
	$(BIN)/pytest -n logical --dist worksteal -m "not medium and not turns and not slow"

test-slow: $(STAMP) ## the tests marked `slow`, and the long turn of those marked `turns`
	TEACHER_CACHE_LONG_TESTS=1 $(PYTEST) -m "slow or turns"

# Warnings are not errors here: old releases raise warnings that newer ones have fixed.
test-oldest: BIN := $(OLDEST)/bin
test-oldest: $(OLDEST)/.installed ## the tests of `make test` with the lowest versions that pyproject.toml allows
	$(PYTEST) -m "not slow" -W default

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(call install,$(OLDEST),--constraint constraints-oldest.txt --editable '.[dev]')
	@touch $@

constraints-oldest: $(STAMP) ## write constraints-oldest.txt again, after a change of dependencies
	$(BIN)/uv pip compile --quiet --upgrade --resolution lowest-direct --extra dev --python-version 3.11 \
		--no-annotate --custom-compile-command 'make constraints-oldest' pyproject.toml --output-file constraints-oldest.txt

# Each benchmark prints one JSON line with the device and the versions; The last three need no GPU.
GPU_RESULTS := benchmarks/results/gpu.jsonl
GPU_BENCHMARKS := target_overhead build_overhead online_vs_cached sweep_cost compiled
# The digits need no download. GPU_DATASET=cifar100-resnet32x4 is the paper's run, whose images must be there.
GPU_DATASET := digits
EIGHT_STUDENTS := resnet8x4,resnet8x4,resnet8x4,resnet8x4,resnet8x4,resnet8x4,resnet8x4,resnet8x4
gpu: $(STAMP) ## on a machine with CUDA: the tests that need it, and the benchmarks of training, in benchmarks/results/
	@$(BIN)/python -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'make gpu: no CUDA device')"
	@mkdir -p $(dir $(GPU_RESULTS))
	$(BIN)/pytest -m cuda --junitxml=$(dir $(GPU_RESULTS))gpu-tests.xml
	for name in $(GPU_BENCHMARKS); do \
		$(BIN)/python benchmarks/$$name.py --device cuda >> $(GPU_RESULTS) || exit 1; done
	$(BIN)/python benchmarks/train_throughput.py --dataset $(GPU_DATASET) --precision bfloat16 --schedule 240 --device cuda \
		>> $(GPU_RESULTS)
	for mode in off step; do $(BIN)/python benchmarks/sweep_cost.py --dataset $(GPU_DATASET) --students $(EIGHT_STUDENTS) \
		--compile $$mode --device cuda >> $(GPU_RESULTS) || exit 1; done
	$(BIN)/python benchmarks/build_overhead.py --dataset $(GPU_DATASET) --compiled --set precision=bfloat16 --device cuda \
		>> $(GPU_RESULTS)
	for name in host_time launches read_view; do $(BIN)/python benchmarks/$$name.py >> $(GPU_RESULTS) || exit 1; done

docs: $(STAMP) ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(STAMP) ## sdist and wheel in dist/, and the main job run from the wheel alone
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	WHEEL=$$(ls $(CURDIR)/dist/*.whl) $(BIN)/pytest tests/system/test_wheel.py

check: $(STAMP) ## ruff, mypy, import contracts, hadolint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

clean: ## remove the environment and everything the demo made
	rm -rf $(VENV) $(OLDEST) runs/demo dist site
