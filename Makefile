# `make test` and `make demo` set everything up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of torch is pinned; on a machine with a card set TORCH to its CUDA build.
TORCH ?= torch==2.13.0

$(VENV)/ready: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q $(TORCH) numpy
	$(BIN)/pip install -q triton==3.6.0 pytest pytest-benchmark hypothesis scipy safetensors av pillow \
		einops ruff basedpyright==1.40.2 tqdm setuptools wheel pybind11 cmake ninja
	touch $@

.PHONY: install test demo lint gpu-check
install: $(VENV)/ready
	VIDOPS_CUDA=$${VIDOPS_CUDA:-AUTO} $(BIN)/pip install -q --no-deps -e .

lint: $(VENV)/ready
	$(BIN)/ruff check .
	rm -rf build/types && $(BIN)/python setup.py -q build_py --build-lib build/types
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# How Triton runs and what stands for the CUDA half is settled at import, hence three processes. Each fails when a
# backend that it is there for did not run. The native one takes as long as the other two, which run beside it.
PYTEST := $(BIN)/pytest -q -m "not slow and not network"
test: install lint
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 test-native test-emulated

.PHONY: test-native test-emulated
test-native:
	VIDOPS_TEST_REQUIRE=reference,cpu $(PYTEST) tests
test-emulated:
	VIDOPS_CUDA_SHIM=1 VIDOPS_TEST_REQUIRE=cuda $(PYTEST) tests/ops
	TRITON_INTERPRET=1 VIDOPS_TEST_REQUIRE=triton $(PYTEST) tests/ops tests/test_triton_dropout.py \
		tests/test_slot_attend_triton.py tests/test_memory.py

# For a machine with a card: needs no network and installs nothing, so PYTHON must have what CONTRIBUTING.md lists.
gpu-check:
	$(PYTHON) bench/gpu_check.py $(ARGS)

demo: install
	$(BIN)/python -m vidops
	$(BIN)/python -m vidops segment --demo -o demo_out
