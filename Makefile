# make train, make test: each sets up .venv on first use. ARGS="..." is handed on.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help setup train test lint mutants bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

setup: $(INSTALLED)  ## create .venv with the tested versions

# The stamp is written last: an interrupted set-up starts over.
$(INSTALLED): pyproject.toml constraints.txt
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

train: $(INSTALLED)  ## train the default model (arithmetic, no download, no GPU needed)
	$(BIN)/torchrun --standalone gcrm_fast/train.py $(ARGS)

test: lint  ## lint, type check, run the tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: $(INSTALLED)  ## plant known faults; every one must turn a test red
	$(BIN)/python tests/mutants.py $(ARGS)

bench: $(INSTALLED)  ## contrastive loss: naive, compiled, bmm and ours side by side
	$(BIN)/python bench/contrastive_loss.py $(ARGS)

clean:  ## remove .venv and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build
