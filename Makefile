# make setup | demo | study | study-report | test | lint | test-gpu | bench-gpu | clean          (docs/setup.md)
#
# PYTHON=python3.12         the interpreter that .venv is made from (3.11 to 3.13)
# DETECTRON2=git            upstream's git at a pinned commit instead of the registry's redistribution
# KERNEL=yes                compile torch-ms-deform-attn too, the attention kernel that Python 3.11 needs on GPUs
# TORCH_CUDA_ARCH_LIST=8.0  with it: for GPUs of this kind, on a machine that has none (a login node)
# ROOT=store DATA=datasets  where `make demo` and `make study` write
# KEEP=results/mini/runs    where `make study` keeps finished runs, and `make study-report` reads them

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
DETECTRON2 ?= registry
DETECTRON2_COMMIT ?= 9604f5995cc628619f0e4fd913453b4d7d61db3f
KERNEL ?= no
ROOT ?= store
DATA ?= datasets
KEEP ?= results/mini/runs
PYTEST_WORKERS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# -qq: errors only; warnings of a local pip configuration would bury the five lines below
INSTALL := $(PIP) install -qq --no-build-isolation --require-hashes
LOCKS := $(sort $(wildcard locks/*.lock))
# One stamp for each content of the locks and of pyproject.toml (commands are entry points of the installed package), so
# that neither a checkout nor a touched file installs again.
STAMP := .venv/.setup-$(DETECTRON2)-$(KERNEL)-$(shell cat $(LOCKS) pyproject.toml | sha256sum | cut -c1-12)

.PHONY: help setup demo study study-report test lint test-gpu bench-gpu clean clean-all

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(STAMP) ## create .venv from the hash-pinned locks (nothing happens if it is up to date)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "setup: Python 3.11 to 3.13 is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); try: make setup PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv \
	  || { echo "setup: could not create .venv; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "setup 1/5: build tools"
	@$(PIP) install -qq --require-hashes -r locks/build.lock
	@echo "setup 2/5: packages (some minutes; about 3 GB to download on Linux)"
	@$(INSTALL) -r locks/requirements.lock
	@echo "setup 3/5: panopticapi and mpformer"
	@$(INSTALL) --no-deps -r locks/no-deps.lock
	@$(PIP) install -qq --no-build-isolation --no-deps --editable .
	@echo "setup 4/5: detectron2 ($(DETECTRON2))"
	@bash locks/install-detectron2 $(BIN)/python $(DETECTRON2) $(DETECTRON2_COMMIT)
	@if [ "$(KERNEL)" != yes ]; then \
	  echo "setup 5/5: nothing to compile"; \
	else \
	  echo "setup 5/5: torch-ms-deform-attn (compiles, about a minute)"; \
	  gpu=$$(nvidia-smi -L 2>/dev/null | grep -m 1 ^GPU || true)$${TORCH_CUDA_ARCH_LIST:-}; \
	  FORCE_CUDA=$${gpu:+1} $(INSTALL) --no-deps -r locks/kernel.lock > .venv/kernel-build.log 2>&1 \
	  || { echo "setup: the kernel did not build, see .venv/kernel-build.log; or make setup without KERNEL=yes"; exit 1; }; \
	fi
	@rm -f .venv/.setup-*
	@touch $@
	@echo "setup: done; next: $(BIN)/mpformer doctor"

demo: setup ## the main job: headline@mini trained, evaluated, analysed, rendered (no download)
	$(BIN)/mpformer data prepare shapes --data-root $(DATA)
	$(BIN)/mpformer launch headline --root $(ROOT) --data-root $(DATA)

study: setup ## the runs of results/mini/protocol.md, some 280 of minutes each; stop it at any time, the same goes on
	OMP_NUM_THREADS=1 $(BIN)/python results/mini/run.py --root $(ROOT) --data-root $(DATA) --keep $(KEEP)

study-report: setup ## results/mini/README.md, its figures and README's table from the kept runs, in a minute or two
	$(BIN)/python results/mini/study.py --runs $(KEEP) --lead README.md

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## lint and every test that is not marked slow, slurm or gpu
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile \
	  -m "not slow and not slurm and not gpu" $(PYTEST_ARGS)

test-gpu: setup ## for a machine with GPUs: the tests marked gpu (NCCL, AMP, the CUDA attention kernel)
	@$(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' \
	  || { echo "test-gpu: torch sees no GPU here; run it on a GPU node (srun --gpus=2 make test-gpu)"; exit 1; }
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

bench-gpu: ## at most eight minutes on one GPU: tests, agreement with the CPU, steps of ours and of transformers
	$(BIN)/python -m benchmarks.gpu $(BENCH_ARGS)

clean: ## caches and build products; the run store, datasets and .venv stay
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

clean-all: clean ## .venv too
	rm -rf .venv
