# Every target creates what it needs: a virtual environment with the package and its tools, re-made when
# pyproject.toml changes. `make test VENV=/some/where PYTHON=python3.12` uses another place or interpreter.

VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?=
TESTBED ?= testbed

BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed

# Nothing below may depend on the network once the environment is installed.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-full testbed results recipes quality style

help:  ## Show this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# uv installs the several GB of torch much faster than pip; without one on the PATH, the environment gets its own.
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@command -v uv >/dev/null || test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	@PATH="$$PATH:$(BIN)" uv pip install --python $(BIN)/python -e ".[dev]"
	@touch $@

install: $(STAMP)  ## Install the package and its development tools into VENV

demo: $(STAMP)  ## Caption an unseen clip, plain and with the draft, and compare
	@$(BIN)/sparrow demo

test: $(STAMP)  ## Fast tier of the tests
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-full: $(STAMP)  ## Every test, the long ones included
	@$(BIN)/python -m pytest -m "" --timeout 3600 $(PYTEST_ARGS)

testbed: $(STAMP)  ## Train the built-in models again from nothing into TESTBED (hours; resumes)
	@for family in qwen2.5-vl llava-onevision; do \
		$(BIN)/python -m sparrow_hf.testbed.pretrain --family $$family --output $(TESTBED)/$$family/target && \
		$(BIN)/python -m sparrow_hf.testbed.retrain --target $(TESTBED)/$$family/target \
			--output $(TESTBED)/$$family/draft || exit 1; \
	done

results: $(STAMP)  ## Train the rivals, measure everything, write docs/results.md (hours from nothing; resumes)
	@$(BIN)/python -m sparrow_hf.testbed.results --work docs/data/results --processes 2 \
		--output docs/data/results.json --report docs/results.md

recipes: $(STAMP)  ## Compare training recipes on the built-in target: docs/recipes.md (hours; resumes)
	@$(BIN)/python -m sparrow_hf.testbed.recipes --work $(TESTBED)/recipes --processes 2 \
		--output docs/data/recipes.json --report docs/recipes.md

quality: $(STAMP)  ## Lint, formatting and types, nothing changed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy src

style: $(STAMP)  ## Fix lint and formatting in place
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
