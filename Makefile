# Each target makes its own .venv when missing; nothing else is prepared.
#   make quickstart            the whole path on real input (installs Paddle, not PyTorch)
#   make train-digits          train the small network on handwritten digits, from scratch
#   make finetune-digits       teach the shipped network even against odd on the same images
#   make test                  all tests (installs PyTorch too)
#   make test-fast             the tests to run while working
#   make lint                  style and types
# Extra options for pip, for example to get PyTorch's CPU build where pip would take the CUDA one:
#   make test PIP_OPTIONS="--extra-index-url URL"
PYTHON ?= python3
PIP_OPTIONS ?=
PYTEST_OPTIONS ?= --numprocesses auto
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS)

.PHONY: quickstart train-digits finetune-digits test test-fast lint clean

quickstart: $(VENV)/.cpu
	$(BIN)/fcvit quickstart

train-digits: $(VENV)/.cpu
	rm -rf runs/train-digits
	$(BIN)/python scripts/write_digits.py runs/digits
	$(BIN)/fcvit train digits --data runs/digits --output runs/train-digits

finetune-digits: $(VENV)/.cpu
	rm -rf runs/finetune-digits
	$(BIN)/python scripts/write_digits.py runs/even-odd --even-odd
	$(BIN)/fcvit finetune --weights src/fcvit/assets/digits.pth.tar --data runs/even-odd \
	  --crop padded --flip 0 --rand-augment 0 --erasing 0 --epochs 6 --output runs/finetune-digits

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_OPTIONS)

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_OPTIONS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

clean:
	rm -rf $(VENV) dist .pytest_cache .hypothesis .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11 to 3.13 is needed, $(PYTHON) is not; choose one with make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }  # half of one would pass for a whole one

# A stamp for each set of packages: installed again when the project's metadata changes.
$(VENV)/.cpu: pyproject.toml | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[cpu,report]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[cpu,dev]' '$(TORCH)'
	@touch $@ $(VENV)/.cpu
