# Everything a fresh machine needs: Python >= 3.10, git and make.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
TESTS ?=
BENCH ?=
JOBS ?= 2
RUN := $(VENV)/bin/python -m
# Tests of one file stay in one process; each of the JOBS processes computes with one thread.
PARALLEL := --numprocesses $(JOBS) --dist loadfile
EXTRAS := experiments,vision,storage,channels,parquet,launchers,sweepers,loggers
# The extras and the dependency groups of pyproject.toml that a target needs; the file $(VENV)/<name> says that they are installed.
$(VENV)/demo: NEEDS := --editable ".[experiments]"
$(VENV)/test: NEEDS := --editable ".[$(EXTRAS)]" --group test
$(VENV)/lint: NEEDS := --editable ".[$(EXTRAS)]" --group lint
$(VENV)/docs: NEEDS := --group docs
$(VENV)/release: NEEDS := --group release
INSTALLED := $(addprefix $(VENV)/,demo test lint docs release)

.PHONY: demo test test-slow test-oldest bench gpu docs lint dist clean
.DEFAULT_GOAL := demo
.NOTPARALLEL:

demo: $(VENV)/demo  ## a lottery ticket on MNIST-1D, with its controls: table, records and figure
	$(RUN) experiments.run --multirun experiment=mnist1d kind=ticket,reinit,random
	$(RUN) experiments.report runs/mnist1d

test: $(VENV)/test  ## the test suite that runs at every push; TESTS= are the files or options of pytest
	$(RUN) pytest $(PARALLEL) $(TESTS)

test-slow: $(VENV)/test  ## all of it, long sweeps too
	$(RUN) pytest $(PARALLEL) -m "slow or not slow"

test-oldest: oldest.txt  ## the test suite with the oldest versions that pyproject.toml allows
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=oldest.txt

bench: $(VENV)/test  ## each claim of speed, against the named peer, as ratios, and one table; BENCH= are the names of some
	$(RUN) experiments.benchmarks $(BENCH)

gpu:  ## what holds on a GPU: tests, benchmarks, one experiment, within ten minutes; installs nothing where $(VENV) is missing
	$(firstword $(wildcard $(VENV)/bin/python) $(PYTHON)) -m experiments.gpu

docs: $(VENV)/docs  ## the documentation, into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

lint: $(VENV)/lint  ## style and types
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) pyright

dist: $(VENV)/release  ## the packages that a release uploads, into dist/
	rm -rf dist
	$(RUN) build
	$(RUN) twine check --strict dist/*

$(INSTALLED): pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(RUN) pip install --quiet --constraint $(CONSTRAINTS) $(NEEDS)
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python >= 3.10 is needed; set PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --upgrade pip

oldest.txt: pyproject.toml  # each lower bound as the version to install
	grep -oE '"[A-Za-z0-9_-]+(\[[a-z,]+\])?[>=]=[0-9][0-9a-z.]*' $< | sed -E 's/"//; s/\[.*\]//; s/>=/==/' | sort -u > $@

clean:
	rm -rf .venv .venv-oldest oldest.txt
