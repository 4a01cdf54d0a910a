# `make` lists the targets. Everything runs in $(VENV), which is made when it is first needed.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= cpu,test,dev
WORKERS ?= 2
ARCHWRIGHT_TORCH ?=
ARCHWRIGHT_TORCH_INDEX ?=

BIN := $(VENV)/bin
# The stamp's name carries the settings, so that changing one installs again.
READY := $(VENV)/ready-$(EXTRAS)-torch$(ARCHWRIGHT_TORCH)
CONSTRAINTS := $(VENV)/constraints.txt
# pip repeats a failed request by itself; a second try of the whole command also outlives a registry's bad minute.
PIP := twice() { "$$@" || { echo "Trying once more in 10 s."; sleep 10; "$$@"; }; }; \
       twice $(BIN)/python -m pip --disable-pip-version-check --retries 8 install -c $(CONSTRAINTS)
# One thread per test process: the workers use the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --junit-xml $(VENV)/tests.xml

OLD_PYTHON := import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Archwright needs Python 3.11 or newer, \
and this is %s (%s). Name another one: make PYTHON=python3.12 ..." % (sys.version.split()[0], sys.executable))

.PHONY: help setup demo test test-quick test-slow lint typecheck bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## make .venv and install Archwright with everything that the demo and the tests need
	@echo "Ready. To type \`archwright\` without a path: . $(BIN)/activate"

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON). Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c '$(OLD_PYTHON)'
	@$(BIN)/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "$(PYTHON) -m venv failed; on Debian and Ubuntu the package python3-venv provides it." >&2; exit 1; }
	@rm -f $(VENV)/ready-*
	@sed '$(if $(ARCHWRIGHT_TORCH),s/^torch==.*/torch==$(ARCHWRIGHT_TORCH)/)' constraints.txt > $(CONSTRAINTS)
	@echo "Installing PyTorch"
	@$(PIP) $(if $(ARCHWRIGHT_TORCH_INDEX),--index-url '$(ARCHWRIGHT_TORCH_INDEX)') torch
	@echo "Installing Archwright [$(EXTRAS)]"
	@$(PIP) --quiet -e '.[$(EXTRAS)]'
	@echo "Installing TensorRT for RTX (optional)"
	@$(BIN)/python -m pip --disable-pip-version-check --quiet install -c $(CONSTRAINTS) tensorrt-rtx-cu13 \
	    || echo "NOTE: TensorRT for RTX does not install here. Engines are not built, and their tests are skipped."
	@touch $(READY)

demo: $(READY) ## train, finetune, export, verify and generate: about 6 minutes on 2 cores
	@$(BIN)/python examples/demo/run.py

test: $(READY) ## every test but `slow` and `gpu`, and the time of each family
	@status=0; $(PYTEST) -m "not slow and not gpu" || status=$$?; \
	    $(BIN)/python tests/shares.py $(VENV)/tests.xml; exit $$status

test-quick: $(READY) ## the tests that need seconds
	@$(PYTEST) -m "not heavy and not slow and not gpu"

test-slow: $(READY) ## the tests that need minutes or a GPU
	@$(PYTEST) -m "slow or gpu" --timeout 3600

lint: $(READY) ## ruff and the import layers
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/lint-imports

typecheck: $(READY) ## pyright, strict on the language, the IR and the blocks
	@$(BIN)/python tests/linktree/check.py

bench: $(READY) ## measure; results go to benchmarks/results
	@for harness in benchmarks/bench_*.py; do $(BIN)/python "$$harness" || exit 1; done

clean: ## remove .venv, build products and caches (the demo's results stay)
	rm -rf .venv .venv-ci build dist archwright.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
