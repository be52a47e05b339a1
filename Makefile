# Two commands are enough: `make ranking` and `make test`. Each sets a fresh machine up first.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BUILT := $(VENV)/.built
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup ranking retrieval test lint format docs cuda clean

help:  ## Show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(BUILT)  ## Create .venv with everything that the recipes and tests need

# torch goes first and with its own dependencies (its CUDA builds need them). All else comes from the lock with
# --no-deps, since torchrec's metadata asks for a clashing fbgemm and an old torchmetrics.
$(READY): requirements/lock.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(head -n 1 requirements/lock.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements/lock.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
		$$(if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; \
			then echo fbgemm-gpu==$(FBGEMM); else echo fbgemm-gpu-cpu==$(FBGEMM); fi)
	@touch $@

# The package and its libraries for the CPU: built anew where their sources have changed.
$(BUILT): $(READY) csrc/CMakeLists.txt $(shell find csrc/common csrc/hkv -type f)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation --editable .
	$(BIN)/python -m genrec.environment
	@touch $@

FBGEMM := 1.8.0

ranking: setup  ## Train and test an HSTU ranking model on synthetic data (ARGS="key=value ...")
	$(BIN)/python -m genrec.recipes.ranking $(ARGS)

retrieval: setup  ## Train and test an HSTU retrieval model on synthetic data (ARGS="key=value ...")
	$(BIN)/python -m genrec.recipes.retrieval $(ARGS)

test: setup  ## Run all tests (ARGS="tests/unit -k name")
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)  ## ruff, format check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## Format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

docs: setup  ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The wheel holds CUTLASS's headers; its own dependencies serve its Python tools, which nothing here uses. Narrow the
# table of kernels for a quicker build: make cuda CUDA_ARGS='-DGENREC_ATTENTION_DIMS="64;128"' (csrc/attention).
CUTLASS := 4.2.0.0
CUDA_ARGS ?=
JOBS ?= $(shell nproc)

cuda: setup  ## Build the CUDA attention kernels for Hopper (needs nvcc; minutes)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps nvidia-cutlass==$(CUTLASS)
	@start=$$SECONDS; \
	$(BIN)/cmake -S csrc -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" -DGENREC_CUDA=ON \
		-DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" $(CUDA_ARGS) && \
	$(BIN)/cmake --build build/cuda --target genrec_attention --parallel $(JOBS) && \
	$(BIN)/cmake --install build/cuda --prefix . --component attention && \
	echo "Built in $$((SECONDS - start)) s on $(JOBS) cores."

clean:  ## Remove what the other targets made, .venv included
	rm -rf $(VENV) build dist site runs .pytest_cache .mypy_cache .ruff_cache genrec/_lib
