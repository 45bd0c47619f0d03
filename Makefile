# Two commands a newcomer needs: `make quickstart` and `make test`. Both set up everything themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=
PIP    := $(BIN)/python -m pip --disable-pip-version-check
TORCH  := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

.PHONY: help quickstart test test-slow lint bench clean

help:               ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

quickstart: $(VENV)/.quickstart   ## raw text -> tokenizer -> pretraining -> SFT -> report -> chat page
	@$(BIN)/hanlin quickstart $(ARGS)

# One thread a worker: the tests' models are tiny, and threads of two workers would only wait for each other.
test: $(VENV)/.dev lint           ## lint, types, import floors, then the test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 8 --dist loadgroup $(ARGS)

test-slow: $(VENV)/.dev           ## the long tests
	@$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.dev                ## ruff, types on src, import floors
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check .
	@$(BIN)/ty check -q src
	@floors=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$floors"; exit 1; }

bench: $(VENV)/.dev               ## every benchmark, beside its peer: Markdown here, JSON in benchmarks/results
	@for b in benchmarks/bench_*.py; do $(BIN)/python $$b $(ARGS) || exit 1; done

clean:              ## remove the environment and caches (runs/ stays)
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# The stamps make a second call start at once; they are redone when the dependencies change.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Hanlin needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Setting up $(VENV): PyTorch first (a range would pull gigabytes of CUDA packages) ..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || { \
	  echo "Python could not make an environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(PIP) install -q -U pip
	@$(PIP) install -q "$(TORCH)"
	@touch $@

$(VENV)/.quickstart: $(VENV)/.torch pyproject.toml
	@echo "Installing Hanlin with the server and the pages ..."
	@$(PIP) install -q -c constraints.txt -e '.[studio]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "Installing Hanlin with everything its tests need ..."
	@$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.quickstart
