# Two commands: `make demo` and `make test`. Both make .venv and install what is missing.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export RAY_AUTH_MODE ?= disabled

.PHONY: install demo test test-slow clean

install: $(STAMP)

# torch first and alone: a resolver that may choose takes a CUDA build of several GB
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(BIN)/vkd run jobs/demo.yaml

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n 2 --dist loadfile --ignore tests/e2e --ignore tests/cluster
	$(BIN)/pytest -m "not slow" tests/e2e
	$(BIN)/pytest -m "not slow" tests/cluster

test-slow: install
	$(BIN)/pytest -m slow

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
