# Each target sets up .venv first, from the pinned lists; a second call installs nothing. It is
# compiled there and then: every rank of every job imports some 6,000 files.
PYTHON ?= python3
TORCH := torch==2.13.0
UV := uv==0.13.9

# uv trusts what the system trusts: a proxy's own certificate may be known to it alone.
export UV_SYSTEM_CERTS := 1

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The stamp holds a hash of what was installed: a file that is only newer installs nothing.
KEY := $(shell { echo '$(TORCH) $(UV)'; cat requirements/cpu.txt pyproject.toml; } | cksum | tr ' ' '-')

FAST := not slow and not exhaustive and not gpu and not multigpu
# Two workers for two cores; one of them has all tests that start ranks (tests/conftest.py).
WORKERS := -n 2 --dist loadscope --no-loadscope-reorder
SLOW := slow and not exhaustive and not gpu and not multigpu

.PHONY: help install sanity sanity-moe mismatch sweep test test-slow test-exhaustive test-gpu gpu check docs doctor clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:
	@echo 'make sanity      the sanity experiment, BF16 against FP16, dense model; ends with a report'
	@echo 'make sanity-moe  the same with the MoE model'
	@echo 'make mismatch    vLLM against Megatron in BF16, FP16 and FP32 on SmolLM2-135M; ends with a report'
	@echo 'make sweep       every algorithm on the tiny models, resumable; fills the table of docs/results.md'
	@echo 'make test        the tests'
	@echo 'make test-slow   the tests that take minutes'
	@echo 'make test-exhaustive  every pair of layouts of up to 16 ranks, where the slow tests take a sample'
	@echo 'make test-gpu    the tests of one GPU, in the environment of a GPU host (docs/gpu.md)'
	@echo 'make gpu         those tests, and everything that one GPU is to be measured for'
	@echo 'make check       ruff, mypy, the direction of imports, and the docs'
	@echo 'make docs        the documentation as a site, in docs/_build/html'
	@echo 'make doctor      what is installed, and what is wrong with it'
	@echo 'make install     set up .venv (every target does it when needed)'
	@echo 'make clean       remove .venv and caches; runs/ stays'
	@echo 'PYTHON=python3.12 chooses the interpreter; ALGO=PG-Seq-IS the algorithm of a sanity experiment'

# An earlier result is kept in runs/sanity-<model>.previous.
sanity: install
	@$(BIN)/python -m megatron_precision sanity --model dense $(if $(ALGO),--algo '$(ALGO)')

sanity-moe: install
	@$(BIN)/python -m megatron_precision sanity --model moe $(if $(ALGO),--algo '$(ALGO)')

mismatch: install
	@$(BIN)/python -m megatron_precision mismatch --model smollm2 --rollouts 2 --out runs/mismatch-smollm2

sweep: install
	@$(BIN)/python benchmarks/sweep.py

test: install
	$(BIN)/python -m pytest $(WORKERS) -m '$(FAST)'

# pytest ends with 5 when no test has the mark; that is no failure, and every other code is.
test-slow: install
	@$(BIN)/python -m pytest -m '$(SLOW)' || { code=$$?; test $$code -eq 5 || exit $$code; }

test-exhaustive: install
	$(BIN)/python -m pytest -m exhaustive --timeout 3600

# On a GPU host, with the interpreter of its environment (docs/gpu.md): make test-gpu GPU_PYTHON=...
GPU_PYTHON ?= python
test-gpu:
	@$(GPU_PYTHON) -m pytest -m 'gpu and not slow' tests/gpu

# A second call goes on where the first was stopped. BUDGET_S=600 ends it after so many seconds.
GPU_OUT ?= docs/benchmarks/raw/gpu
gpu:
	@$(GPU_PYTHON) benchmarks/gpu/run.py --out $(GPU_OUT) $(if $(BUDGET_S),--budget-s $(BUDGET_S)); code=$$?; \
	  test $$code -ge 2 && exit $$code; \
	  $(GPU_PYTHON) benchmarks/gpu/run.py --out $(GPU_OUT) --tables && exit $$code

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports
	@$(MAKE) --no-print-directory docs

docs: install
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

doctor: install
	@$(BIN)/python -m megatron_precision doctor

install:
	@test "$$(cat $(STAMP) 2>/dev/null)" = '$(KEY)' || $(MAKE) --no-print-directory .setup

.PHONY: .setup
.setup:
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'error: no $(PYTHON); install Python 3.11 or newer, or say PYTHON=/path/to/python' >&2; \
	  exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $$($(PYTHON) --version) is too old: Python 3.11 or newer is needed;" \
	    'say PYTHON=python3.11 where it has another name' >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'error: $(PYTHON) has no venv module; install it (python3-venv on Debian and Ubuntu)' >&2; \
	  exit 2; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { \
	  echo 'error: no C++ compiler, which torch needs for vLLM; install gcc and g++' >&2; exit 2; }
	@echo 'setting up $(VENV), once'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(UV) $(TORCH)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --compile-bytecode \
	  -r requirements/cpu.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@echo '$(KEY)' > $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
