# Every target sets up what it needs: a virtual environment in .venv with the versions of requirements.lock.

PYTHON ?= python3
VENV ?= .venv
# Versions that the environment gets.
REQUIREMENTS ?= requirements.lock
ARGS ?=
# Extra pip arguments for the torch step only, for example to take a CPU build from another index.
TORCH_PIP_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' $(REQUIREMENTS))
# In an environment of its own, .venv-mutants, so that requirements.lock does without it.
MUTMUT := mutmut==3.8.1
# Read before any recipe runs, so that the demo's wall time includes the installation.
STARTED := $(shell date +%s)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo demo-full test test-lowest lint format bench mutants clean

help:  ## show this list
	@echo "usage: make TARGET [ARGS='...'] [PYTHON=python3.11]"
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "  %-12s %s\n", $$1, $$2 }'

demo: $(STAMP)  ## distil, sample, evaluate and report, within 10 minutes on 2 cores
	@SWD_SETUP_SECONDS=$$(( $$(date +%s) - $(STARTED) )) $(BIN)/swd demo $(ARGS)

demo-full: $(STAMP)  ## the same at length, about an hour
	@SWD_SETUP_SECONDS=$$(( $$(date +%s) - $(STARTED) )) $(BIN)/swd demo experiment=demo_full $(ARGS)

test: $(STAMP)  ## run the tests (ARGS='-m slow' for the slow ones)
	@$(BIN)/python -m pytest -q -n auto --dist loadfile $(ARGS)

test-lowest:  ## run the tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	@$(MAKE) --no-print-directory VENV=.venv-lowest REQUIREMENTS=requirements-lowest.txt test

lint: $(STAMP)  ## check style, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy swd train.py sample.py

format: $(STAMP)  ## reformat, and fix what can be fixed
	@$(BIN)/ruff check --fix-only --exit-zero .
	@$(BIN)/ruff format .

bench: $(STAMP)  ## time training and sampling, at real size on a GPU (ARGS='--against PATH': the tiny iteration against another checkout)
	@$(BIN)/python benchmarks/suite.py $(ARGS)

mutants:  ## put small mistakes into the core and see that tests fail (ARGS='swd.losses*' for a part); takes hours
	@$(MAKE) --no-print-directory VENV=.venv-mutants .venv-mutants/.mutmut
	@.venv-mutants/bin/python -m mutmut run --max-children 2 $(ARGS)
	@.venv-mutants/bin/python -m mutmut results

.venv-mutants/.mutmut: .venv-mutants/.installed
	@.venv-mutants/bin/python -m pip install -q $(MUTMUT)
	@touch $@

clean:  ## remove caches and build products; outputs/ and the environment stay
	@rm -rf build dist mutants *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
	@find . -name __pycache__ -type d -not -path './.venv*' -not -path './.git/*' -prune -exec rm -rf {} +
	@echo "clean; to install afresh next time: rm -rf $(VENV)"

$(STAMP): pyproject.toml setup.py $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: swd needs Python 3.11 or newer, '$(PYTHON)' is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || { echo "==> creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "==> installing $(TORCH) (its first download can be large)"
	@$(PIP) install -q $(TORCH_PIP_ARGS) $(TORCH)
	@echo "==> installing the versions of $(REQUIREMENTS)"
	@$(PIP) install -q -r $(REQUIREMENTS)
	@# An earlier checkout was installed under the name swd, and its files would stay beside the new ones.
	@! $(PIP) show -q swd >/dev/null 2>&1 || $(PIP) uninstall -q -y swd
	@echo "==> installing swd, editable"
	@$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@
