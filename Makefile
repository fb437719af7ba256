# make train, make test: each sets up .venv on first use; make gpu uses PYTHON itself. ARGS="..." is handed on.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
WITH_BENCH := .venv/.bench

.PHONY: help setup train evaluate test test-all lint mutants torture bench gpu clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

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

# Trains the default model, and the same without the contrastive loss, where runs/ does not hold them yet.
evaluate: $(INSTALLED)  ## does it work? samples, goals, AUROC, votes and where Q drops, on the default model
	$(BIN)/python experiments/arithmetic_chain.py $(ARGS)

# A process per core, up to four, with one thread each: threads of several processes would wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: lint  ## lint, type check, run the tests
	$(PYTEST) -m "not slow" $(ARGS)

test-all: lint  ## the same with the slow tests
	$(PYTEST) $(ARGS)

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: $(INSTALLED)  ## plant known faults; every one must turn a test red
	$(BIN)/python tests/mutants.py $(ARGS)

$(WITH_BENCH): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	touch $@

torture: $(INSTALLED)  ## kill and starve training runs, some twenty minutes
	$(BIN)/python -m pytest tests/torture.py $(ARGS)

bench: $(WITH_BENCH)  ## training step, scoring and contrastive loss, side by side with what people run
	$(BIN)/python bench/train_step.py $(ARGS)
	$(BIN)/python bench/scoring.py $(ARGS)
	$(BIN)/python bench/contrastive_loss.py $(ARGS)

# No set-up and no download: the machine's own torch is what is measured. WHEELS=FOLDER holds packages that it lacks.
gpu:  ## tests, benchmarks and a training run on a CUDA device, at most ten minutes
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels $(PYTHON) bench/gpu.py $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

clean:  ## remove .venv and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build
