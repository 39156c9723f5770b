# Needs GNU make and a Python >= 3.11; everything else goes into .venv.

PYTHON      ?=
FEDVB_ARGS  ?=
PYTEST_ARGS ?=

VENV := .venv
BIN  := $(VENV)/bin
DEMO := $(VENV)/.installed-demo
DEV  := $(VENV)/.installed-dev
CODE := vblora fl_client fl_server simulations

# Tests marked gpu run where there is one.
MARKERS := not slow$(if $(wildcard /dev/nvidia[0-9]*),, and not gpu)

# Offline, and no messages home; each can be overridden from the environment.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export FLWR_TELEMETRY_ENABLED ?= 0
export FLWR_DISABLE_UPDATE_CHECK ?= 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION ?= 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help simulate install test test-slow check format proto clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  Options: PYTHON=python3.12  FEDVB_ARGS="--rounds 3"  PYTEST_ARGS="-x -k wire"'

simulate: $(DEMO) ## federated VB-LoRA on a real model and real text, offline, about 3 minutes
	$(BIN)/fedvb simulate $(FEDVB_ARGS)

install: $(DEV) ## make .venv and install the package with everything that the checks need

test: $(DEV) ## the test suite, offline, under 10 minutes
	$(BIN)/pytest -m "$(MARKERS)" $(PYTEST_ARGS)

test-slow: $(DEV) ## the slow tests: kills, fuzzing, long runs
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

check: $(DEV) ## lint, format, strict types, and which room imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(addprefix -p ,$(CODE))
	$(BIN)/lint-imports

format: $(DEV) ## format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(DEV) ## the trainer's gRPC code, from fl_client/trainer.proto
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. fl_client/trainer.proto

clean: ## remove .venv, caches and build output (runs/ stays)
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# pip installs itself last, so it tells a whole .venv from one whose making was interrupted.
$(BIN)/pip:
	@for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
	    echo "Making $(VENV) with $$("$$python" -V) ..."; \
	    "$$python" -m venv $(VENV) && exit 0; \
	    echo "make: '$$python -m venv $(VENV)' failed (see above); Debian and Ubuntu need the package python3-venv." >&2; \
	    rm -rf $(VENV); exit 1; \
	done; \
	echo "make: found no Python >= 3.11 (tried: $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python))." \
	     "Install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
	exit 1

INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e

$(DEMO): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing fed-vblora into $(VENV) (the first time: about 1 GB, some minutes) ..."
	@$(INSTALL) ".[demo]"
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing fed-vblora and its tests into $(VENV) (the first time: about 1.5 GB, some minutes) ..."
	@$(INSTALL) ".[demo,ray,peft,quantize,monitor,text-scores,dev]"
	@touch $(DEMO) $@
