# make demo    set up and run the whole job on built-in data
# make test    set up and run the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.rkd-ready
# One thread a process: the tests and the demo are many small computations.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-promises test-slow test-gpu test-cuda test-ray test-board lint types bench results fuzz soak clean setup

demo: $(STAMP)
	$(BIN)/rkd demo --overwrite

# Files in their order: the largest, with hundreds of quick tests, are not the longest.
test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# What takes minutes: the figures of docs/promises.md (every failing write of every command, kills at random times and of
# every method, mutants through every command) and more variants of quick tests
test-promises: $(STAMP)
	RKD_PROMISES=1 $(BIN)/python -m pytest -n auto --dist worksteal -m promise

test-slow: $(STAMP)
	RKD_SLOW=1 RKD_PROMISES=1 $(BIN)/python -m pytest

# On a board: JetPack's TensorRT and CUDA through --system-site-packages, and nothing of torch. Not run on a Jetson.
BOARD := $(or $(RKD_BOARD_VENV),.venv-board)
test-gpu:
	test -x $(BOARD)/bin/python || $(PYTHON) -m venv --system-site-packages $(BOARD)
	$(BOARD)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[trt,ort]' pytest pytest-timeout onnx
	RKD_GPU=1 $(BOARD)/bin/python -m pytest -m gpu tests/bench/test_tensorrt.py

# Distillation on a workstation's GPU
test-cuda: $(STAMP)
	RKD_GPU=1 $(BIN)/python -m pytest -m gpu tests/test_session.py

test-ray: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest -m ray tests/suite

test-board: $(STAMP)
	$(BIN)/python tests/board/check_board.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# results/*/table.* and the tables of docs/results.md, from the records in results/
results: $(STAMP)
	for suite in results/*/; do $(BIN)/rkd suite suites/$$(basename $$suite).toml --table-only >/dev/null || exit 1; done
	$(BIN)/python tests/published.py

# Release figures: SECONDS=3600 make fuzz soak
SECONDS ?= 600
fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/fuzz.py --replay --seconds $(SECONDS) --commands 40 --seed $${SEED:-1} --keep build/fuzz

soak: $(STAMP)
	RKD_SLOW=1 RKD_SOAK_SECONDS=$(SECONDS) $(BIN)/python -m pytest -n 0 tests/faults/test_every_method.py -k random

bench: $(STAMP)
	$(BIN)/python tests/benchmarks/run.py
	$(BIN)/python tests/benchmarks/bench.py
	$(BIN)/python tests/benchmarks/export.py

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo 'setting up $(VENV), once: PyTorch with its CUDA libraries and the tools take 5 to 7 GB and some minutes'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[train,ort,sign,rtx,dev]'
	touch $@

clean:
	rm -rf build dist demo .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
