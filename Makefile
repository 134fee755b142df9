# `make quickstart` and `make test` are all that a newcomer needs; both set up .venv first.
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Packages that only development needs come with the `dev` extra.
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev quickstart test drill lint types format lock bench clean

help:
	@echo "make quickstart   three clouds fine-tune SmolLM2-135M together; report in runs/quickstart/"
	@echo "make test         lint, types and tests, as CI runs them"
	@echo "make setup        .venv with what a run needs;  make setup-dev: and with what tests need"
	@echo "make drill        long drills;  make bench: benchmarks;  make format;  make clean"
	@echo "PYTHON=/path/to/python3.12 chooses the interpreter"

$(VENV)/.made:
	@PYTHON="$(PYTHON)" sh tools/make_venv.sh $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made $(INPUTS)
	@echo "installing the packages that a run needs (about a minute)"
	@$(PIP) install -qq --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the packages that the tests need"
	@$(PIP) install -qq --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

quickstart: setup
	@if [ -f runs/quickstart/format ]; then \
	  echo "runs/quickstart holds this run already; going on with it (remove the folder to start anew)"; \
	  $(BIN)/fedjax-llm resume runs/quickstart; \
	else \
	  $(BIN)/fedjax-llm run experiments/quickstart/quickstart.toml --out runs/quickstart; \
	fi

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-dev
	$(BIN)/mypy

test: lint types
	$(BIN)/fedjax-llm models get smollm2-135m
	@# In their order: by size, files of one long test would come last, on one worker alone.
	$(BIN)/python -m pytest -m "not drill" -n 2 --dist loadfile --no-loadscope-reorder

# Drills look at programs as users compile them; `make test` compiles most without optimising.
drill: setup-dev
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -m drill

lock: setup-dev
	@{ head -2 constraints.txt; $(PIP) freeze --exclude-editable; } > constraints.new && mv constraints.new constraints.txt

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python experiments/benchmarks/round.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
