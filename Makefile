PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast matrix check-matrix docs bench lint clean

help:
	@echo 'make setup   build $(VENV) with everything the recipes and the tests need (PYTHON=python3.12 to choose another Python)'
	@echo 'make demo    train a ResNet-20 on two pipeline stages (ARGS="--schedule 1f1b" to pass arguments on)'
	@echo 'make test    lint, check that docs/support.md is not stale, run all tests (ARGS="-k plan" to pass arguments on to pytest)'
	@echo 'make test-fast  only tests that start no processes, and one that trains two stages: for the daily loop'
	@echo 'make matrix  write docs/support.md, what works with what, from the tests that prove it'
	@echo 'make docs    write docs/configuration.md and build the site into build/site; any warning is an error'
	@echo 'make bench   measure DDG against other schedules and the simulator: docs/benchmarks.md (ARGS="--stages 4 --turns 1")'
	@echo 'make lint    ruff, mypy, and who may import whom'
	@echo 'make clean   remove caches, build files and runs/, keep $(VENV)'

setup: $(STAMP)

# A virtual environment whose creation was interrupted has a python but no pip.
$(STAMP): setup.py pyproject.toml
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo 'Installing into $(VENV): a few minutes and 6 GB the first time'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --editable '.[recipes,test]'
	@touch $@

# The launcher as a module: its script starts with the path of .venv, which breaks when the project is moved or the
# path has a space. On CPU whether there are GPUs or not, as README's figures are.
demo: export DS_ACCELERATOR := cpu
demo: export OMP_NUM_THREADS := 1
demo: setup
	@$(BIN)/python -m deepspeed.launcher.runner --quiet --num_gpus 2 recipes/resnet/train.py \
		--deepspeed_config configs/resnet20_digits.json $(ARGS)

# A file's tests run in one process, which shares its ranks among them. Most wait for processes that start, so there is
# one worker more than there are cores, up to four.
WORKERS := $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 3 ? n + 1 : 4)))
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# The optimizers that DeepSpeed compiles are tested, too; it looks for `ninja` on the PATH. Nothing else needs it.
test test-fast matrix: export PATH := $(CURDIR)/$(BIN):$(PATH)

test: lint check-matrix
	@$(PYTEST) $(ARGS)

test-fast: setup
	@$(PYTEST) -m 'pure or smoke' $(ARGS)

# Only what says what it proves.
matrix: setup
	@$(PYTEST) -m 'proves or refuses' --matrix=docs/support.md $(ARGS)

# Collects without running: whether docs/support.md has the rows and cells that the tests claim.
check-matrix: setup
	@$(BIN)/python -m pytest --collect-only -qq --check-matrix=docs/support.md >/dev/null

docs: export NO_MKDOCS_2_WARNING := 1
docs: setup
	@$(BIN)/python docs/site/configuration.py
	@$(BIN)/python -m mkdocs build --strict

# On an idle machine: it times processes that sleep.
bench: setup
	@$(BIN)/python benchmarks/off_cpu.py $(ARGS)

lint: setup
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/python -m mypy
	@$(BIN)/lint-imports --no-cache --no-logo

clean:
	rm -rf build dist runs *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
