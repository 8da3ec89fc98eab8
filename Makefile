# Everything runs in .venv, made on first use. PYTHON may name another interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-all test-tpu test-hf lint

.venv/base: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/base
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@

.venv/tpu: requirements-tpu.txt .venv/dev
	$(BIN)/pip install --quiet --requirement requirements-tpu.txt
	touch $@

.venv/hf: requirements-hf.txt .venv/dev
	$(BIN)/pip install --quiet --requirement requirements-hf.txt
	touch $@

# Huge pages: on CPU a step makes and clears half a gigabyte of memory.
train: .venv/base
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python train.py

# Three workers on two cores: tests of timeouts and retries wait.
test: .venv/dev
	$(BIN)/python -m pytest -n 3 --dist loadfile -m "not slow" --ignore=tests/evidence --ignore=tests/huggingface

# Benchmarks, experiments, fault injection and notebooks too, and the long form of every test: hours.
test-all: .venv/hf
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Programs compiled for TPU; needs no TPU, but its compiler (0.7 GB).
test-tpu: .venv/tpu
	$(BIN)/python -m pytest -n 2 -m "not slow" tests/preflight

# Models that others load; needs torch and Transformers.
test-hf: .venv/hf
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" tests/huggingface

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
