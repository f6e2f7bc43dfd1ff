# The README's two commands are `make demo` and `make test`; each sets up .venv by itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := test,deepspeed,kernels,mpi,data,datasets,eval,sealed,wandb,mlflow
# A PyTorch with CUDA brings the triton that it was built with, one for CPUs brings none: then this one.
TRITON := 3.6.0
export PYTHONSAFEPATH = 1
# Images often set this one; every command and rank would compile officina's files anew, half a second each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo demo-finetune test test-full test-floor lint bench gpu venv clean
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

demo: venv ## build shards, train on 2 ranks, resume on others, generate, report: about 4 minutes on 2 cores
	$(BIN)/officina demo

demo-finetune: venv ## adapt the demo's model with LoRA, evaluate, merge, export, load in transformers
	$(BIN)/officina demo --finetune

test: venv lint ## everything but the full counts and what needs a GPU
	$(BIN)/python -m pytest -m "not slow" --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 15

test-full: venv lint ## also the full counts (hours)
	$(BIN)/python -m pytest

test-floor: ## the tests on the oldest torch that pyproject.toml allows, in .venv-floor (8 GB: this torch comes with CUDA)
	$(PYTHON) -m venv .venv-floor
	grep -v ^torch constraints.txt >.venv-floor/constraints.txt
	DS_BUILD_OPS=0 .venv-floor/bin/python -m pip install --quiet --constraint .venv-floor/constraints.txt \
	  'torch==2.9.*' --editable '.[$(EXTRAS)]'
	.venv-floor/bin/python -m pytest -m "not slow"

lint: venv ## style and imports; changes nothing
	$(BIN)/ruff check .

bench: venv ## the CPU benchmarks that stand in docs/benchmarks.md
	$(BIN)/officina bench all

gpu: ## on a machine with one GPU: gpu-marked tests, then the benchmarks, records to $$OUT
	bash benchmarks/gpu.sh

venv: $(VENV)/.installed ## .venv with the tested set of packages
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"officina needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; try: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@echo "Setting up $(VENV) (once, a few minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@{ $(BIN)/python -m pip install --constraint constraints.txt torch \
	  && { $(BIN)/python -c 'import triton' || $(BIN)/python -m pip install triton==$(TRITON); } \
	  && DS_BUILD_OPS=0 $(BIN)/python -m pip install --constraint constraints.txt --editable '.[$(EXTRAS)]'; \
	  } >$(VENV)/install.log 2>&1 || { tail -30 $(VENV)/install.log; exit 1; }
	@touch $@

clean: ## remove .venv and what the demo made
	rm -rf $(VENV) demo build *.egg-info
