# Everything runs in .venv, which the first target creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench gpu-test marks clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first and pinned: resolved together with the rest, pip would weigh other builds of it.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/slideredit-rt demo --out demo

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# A plain install: mypy cannot follow the folders that an editable one maps into the package.
	rm -rf build && $(BIN)/python -m pip install --quiet --no-deps --target build/typecheck .
	MYPYPATH=build/typecheck $(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m pytest bench -o addopts=-q --benchmark-columns=median,iqr,rounds

marks: $(STAMP)
	$(BIN)/python -m slideredit_rt.bench.marks

gpu-test: $(STAMP)
	$(BIN)/python -m pytest -m gpu -rs

clean:
	rm -rf $(VENV) demo build *.egg-info
