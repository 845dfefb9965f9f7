# Everything a fresh machine needs: Python >= 3.10, git and make.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m

.PHONY: demo test test-slow bench docs lint clean
.DEFAULT_GOAL := demo

demo: .venv/ready  ## a lottery ticket on MNIST-1D, with its controls: table, records and figure
	$(RUN) experiments.run --multirun experiment=mnist1d kind=ticket,reinit,random
	$(RUN) experiments.report runs/mnist1d

test: .venv/ready  ## the test suite that runs at every push
	$(RUN) pytest

test-slow: .venv/ready  ## all of it, long sweeps too
	$(RUN) pytest -m "slow or not slow"

bench: .venv/ready  ## each claim of speed, against the named peer, as ratios
	$(RUN) experiments.benchmarks.selection
	$(RUN) experiments.benchmarks.step
	$(RUN) experiments.benchmarks.imports
	$(RUN) experiments.benchmarks.doctor
	$(RUN) experiments.benchmarks.experiment
	$(RUN) experiments.benchmarks.size
	$(RUN) experiments.benchmarks.inference
	$(RUN) experiments.benchmarks.channels

docs: .venv/ready  ## the documentation, into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict --quiet

lint: .venv/ready  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python >= 3.10 is needed; set PYTHON=...')"
	$(PYTHON) -m venv .venv
	$(RUN) pip install --quiet --upgrade pip
	$(RUN) pip install --quiet --constraint constraints.txt --editable ".[experiments,vision,dev,docs]"
	touch $@

clean:
	rm -rf .venv
