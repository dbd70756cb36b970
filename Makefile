# Needs python3 (3.11 or later), pip and make; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup
ORACLE := $(VENV)/.oracle
# A process for each core; the tests of one file stay together, for the models that they share.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile
# The oracles (torch, TRL, PEFT) are pinned for Python 3.11 alone.
HAS_ORACLE := $(shell $(PYTHON) -c 'import sys; print(int(sys.version_info[:2] == (3, 11)))' 2>/dev/null)

.PHONY: help setup quickstart test test-core lint bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(SETUP)  ## make the virtual environment and fill it from requirements.lock

quickstart: $(SETUP)  ## fine-tune a small model on real data, on this machine's CPU
	$(BIN)/python -m jaxtune.launch --config=configs/quickstart.py --workdir=runs/quickstart-$$(date +%Y%m%d-%H%M%S)

# What the tests of the experts' page need of the machine, and skip where it is not.
define say_what_was_left_out
@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || [ -n "$$JAXTUNE_TEST_POSTGRESQL" ] || \
  echo "left out: the tests on PostgreSQL (Debian: apt-get install postgresql; or JAXTUNE_TEST_POSTGRESQL=postgresql://user@host/)"
@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
  [ -n "$$JAXTUNE_CHROMIUM" ] || echo "left out: the tests in a browser (Debian: apt-get install chromium; or JAXTUNE_CHROMIUM=/path/to/it)"
endef

ifeq ($(HAS_ORACLE),1)
test: $(ORACLE)  ## run every test, the comparisons with torch, TRL and PEFT included
	$(PYTEST)
	$(say_what_was_left_out)
else
test: test-core
	@echo "left out: the tests marked 'oracle' (torch, TRL and PEFT are pinned for Python 3.11: make test PYTHON=python3.11)"
endif

test-core: $(SETUP)  ## run the tests that need no torch
	$(PYTEST) -m "not oracle"
	$(say_what_was_left_out)

lint: $(SETUP)  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(if $(filter 1,$(HAS_ORACLE)),$(ORACLE),$(SETUP))  ## run every benchmark; each prints a ratio (2 = lacks what it needs)
	@failed=0; for file in $$(grep -l '^def main' benchmarks/*.py); do echo "== $$file"; $(BIN)/python "$$file" || [ $$? = 2 ] || failed=1; done; exit $$failed

clean:  ## delete the virtual environment, the caches and what was built; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(SETUP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxtune needs Python 3.11 or later; $(PYTHON) is older or missing: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments; on Debian or Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

$(ORACLE): $(SETUP) requirements-oracle.lock
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -r requirements-oracle.lock
	@touch $@
