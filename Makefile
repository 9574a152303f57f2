# Two commands do all the set-up:  make quickstart  runs the main job,  make test  passes the tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
# One thread per process and one process per core: more of either and they wait for each other, spinning.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist worksteal

.PHONY: environment quickstart test test-fast check format lock clean

environment: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"cl-lab needs Python 3.11 or newer, this is {sys.version}"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: environment
	$(BIN)/cl-lab compare configs/quickstart.yaml

test: environment
	$(PYTEST)

test-fast: environment
	$(PYTEST) -m 'not slow'

check: environment
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_architecture.py
	$(BIN)/pylint --disable=all --enable=duplicate-code --min-similarity-lines=8 cl_lab strategies scenarios

format: environment
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Writes down the set of versions that is installed now.
lock: environment
	( sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' ) > .constraints.tmp
	mv .constraints.tmp constraints.txt

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
