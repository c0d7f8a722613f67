# Two commands do everything on a fresh machine: make train, make test. They create .venv with the pinned versions:
# what training needs, and, before tests, linters and benchmarks, what those need on top.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= tiny
# Two processes, on the CPU or on two cards; one where there is one card.
PROCESSES ?= $(if $(filter 1,$(shell nvidia-smi -L 2>/dev/null | grep -c GPU)),1,2)
# Of a process: together as many as there are cores. (torchrun alone would say 1, with a warning.)
THREADS ?= $(or $(OMP_NUM_THREADS),$(shell cores=$$(nproc); echo $$((cores > $(PROCESSES) ? cores / $(PROCESSES) : 1))))
# Keep freed memory: fresh pages cost more than the work on them (docs/benchmarks.md).
$(foreach setting,$(shell . launch/malloc.sh; env | grep '^MALLOC_'),$(eval export $(setting)))
# As launch/env.py has it: Triton may fuse multiplies and adds.
export TRITON_DEFAULT_FP_FUSION ?= 1

.PHONY: train test test-all test-avx2 lint format bench bench-gpu compile-kernels parity clean-venv

# Errors only: what pip warns of is its index and its cache.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) launch/check_python.py
	@echo "installing into $(VENV): 1.7 GB with torch's CPU build, a minute where the network is fast"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@touch $@

$(VENV)/tested: $(VENV)/installed
	@echo "installing what tests, linters and benchmarks need: 1.2 GB more"
	@$(PIP) --editable '.[test]'
	@touch $@

data/stdlib/dataset.json: | $(VENV)/installed
	$(BIN)/python -m launch prepare

train: $(VENV)/installed data/stdlib/dataset.json
	OMP_NUM_THREADS=$(THREADS) $(BIN)/torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node $(PROCESSES) -m launch train tiny --parallel.ep $(PROCESSES) --name $(RUN) $(ARGS)

PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test: $(VENV)/tested
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/tested
	$(PYTEST) $(ARGS)

# A CPU with AVX-512 plays one without: libraries add in another order there, and have no products in bf16.
# Without features numba takes those of the name.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=
AVX2_TESTS := tests/kernels tests/parallel/engram_table tests/training/model tests/training/engram \
	tests/test_parity.py tests/training/test_loop.py

test-avx2: $(VENV)/tested
	$(AVX2) $(PYTEST) -m "not slow" $(AVX2_TESTS) $(ARGS)

lint: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/tested data/stdlib/dataset.json
	OMP_NUM_THREADS=$$(nproc) $(BIN)/torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 1 -m training.bench.throughput $(ARGS)
	$(BIN)/python -m kernels.bench_cpu
	$(BIN)/python -m parallel.bench.engram_table
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 1 -m training.bench.checkpoint
	OMP_NUM_THREADS=1 $(BIN)/python -m training.bench.checkpoint_resize

# On a card, with whatever python has torch, triton and numba: make bench-gpu BENCH_PYTHON=python3
BENCH_PYTHON ?= $(BIN)/python
bench-gpu: $(if $(filter $(BIN)/python,$(BENCH_PYTHON)),$(VENV)/tested)
	$(BENCH_PYTHON) -m kernels.bench_gpu $(ARGS)
	$(BENCH_PYTHON) -m training.bench.engram $(ENGRAM_ARGS)

compile-kernels: $(VENV)/tested
	$(BIN)/python -m kernels.compile_all $(ARGS)

parity: $(VENV)/tested
	$(BIN)/python -m tests.parity
