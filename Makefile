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
		einops ruff tqdm setuptools wheel pybind11 cmake ninja
	touch $@

.PHONY: install test demo lint gpu-check
install: $(VENV)/ready
	VIDOPS_CUDA=$${VIDOPS_CUDA:-AUTO} $(BIN)/pip install -q --no-deps -e .

lint: $(VENV)/ready
	$(BIN)/ruff check .

# The interpreter switch is read when a kernel is decorated, so compiled and interpreted runs are two processes.
test: install
	$(BIN)/pytest -q -m "not slow and not network" tests
	TRITON_INTERPRET=1 $(BIN)/pytest -q -m "not slow and not network" tests/ops tests/test_triton_dropout.py tests/test_memory.py

# For a machine with a card: needs no network and installs nothing, so PYTHON must have what CONTRIBUTING.md lists.
gpu-check:
	$(PYTHON) bench/gpu_check.py $(ARGS)

demo: install
	$(BIN)/python -m vidops
	$(BIN)/python -m vidops segment --demo -o demo_out
