# Two commands do everything on a fresh machine: make train, make test. They create .venv with the pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= tiny
# Two processes, on the CPU or on two cards; one where there is one card.
PROCESSES ?= $(if $(filter 1,$(shell nvidia-smi -L 2>/dev/null | grep -c GPU)),1,2)
# Keep freed memory: fresh pages cost more than the work on them (docs/benchmarks.md).
export MALLOC_TRIM_THRESHOLD_ ?= 4294967296
export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
export MALLOC_TOP_PAD_ ?= 268435456
# As launch/env.py has it: Triton may fuse multiplies and adds.
export TRITON_DEFAULT_FP_FUSION ?= 1

.PHONY: train test lint format bench bench-gpu compile-kernels parity clean-venv

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

data/stdlib/dataset.json: | $(VENV)/installed
	$(BIN)/python -m launch prepare

train: $(VENV)/installed data/stdlib/dataset.json
	$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) -m launch train tiny --parallel.ep $(PROCESSES) --name $(RUN) $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed data/stdlib/dataset.json
	OMP_NUM_THREADS=$$(nproc) $(BIN)/torchrun --standalone --nproc-per-node 1 -m training.bench $(ARGS)
	$(BIN)/python -m kernels.bench_cpu
	$(BIN)/python -m parallel.engram_table.bench
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 1 -m training.checkpoint.bench
	OMP_NUM_THREADS=1 $(BIN)/python -m training.checkpoint.bench_resize

# On a card, with whatever python has torch, triton and numba: make bench-gpu BENCH_PYTHON=python3
BENCH_PYTHON ?= $(BIN)/python
bench-gpu: $(if $(filter $(BIN)/python,$(BENCH_PYTHON)),$(VENV)/installed)
	$(BENCH_PYTHON) -m kernels.bench_gpu $(ARGS)
	$(BENCH_PYTHON) -m training.bench_engram $(ENGRAM_ARGS)

compile-kernels: $(VENV)/installed
	$(BIN)/python -m kernels.compile_all $(ARGS)

parity: $(VENV)/installed
	$(BIN)/python -m tests.parity
