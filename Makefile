# llmill: `make run` trains a model on this machine's own Python sources; `make test` checks everything.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup run check lint test test-quick test-long clean

help:  ## List the targets
	@grep -E '^[a-z -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## Make .venv and install everything, pinned (nothing to do when up to date)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "llmill needs Python 3.11 or newer; this is `$(PYTHON) --version`. Try: make setup PYTHON=python3.12"; exit 1; }
	@echo "installing into .venv (a few minutes, once)"
	@$(PYTHON) -m venv .venv
	@PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

run: setup  ## Run the quickstart recipe: text to an exported language model
	@$(BIN)/llmill run flows/recipes/quickstart.yaml

check lint: setup  ## Style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check  ## Check, then the tests
	$(BIN)/pytest -n 2 --no-loadscope-reorder

test-quick: setup  ## The tests that take seconds, and one run at toy size: minutes
	$(BIN)/pytest -n 2 --no-loadscope-reorder --quick

test-long: setup  ## The tests that take long each: before a release, and after a change to what they hold
	$(BIN)/pytest -n 2 --no-loadscope-reorder -m long

clean:  ## Remove the environment and the caches (never .llmill, where the models are)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
