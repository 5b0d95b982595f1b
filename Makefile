# Each target creates .venv if it is missing, and installs what it needs.
#   make quickstart            convert, verify, evaluate and predict on real images (installs Paddle, not PyTorch)
#   make train-digits          train the small network on handwritten digits from scratch
#   make finetune-digits       fine-tune the shipped network on even against odd digits
#   make test                  the tests (installs PyTorch too); FCVIT_ALL_TESTS=1 adds those that only CI runs
#   make test-fast             the tests to run while working
#   make test-lowest           the same with the lowest versions that pyproject.toml allows, in .venv-lowest
#   make sanitize              the native code with address, undefined-behavior and thread sanitizers (needs GCC)
#   make lint                  style and types
#   make docs                  the documentation site, in docs/_build/html; warnings are errors
#   make notebook              execute docs/tutorial.ipynb and store its outputs
#   make pictures              draw the pictures of docs/guides/segmentation.md (needs Chromium and its driver);
#                              RUN=FOLDER also draws the curves of a run of scripts/make_nuclei_checkpoint.py;
#                              DETECTOR=FILE INSTANCES=DATA also draws the pictures of detection (see the script)
#   make constraints           write the newest versions to constraints.txt if lint and all tests pass with them
# Extra options for pip, for example to get PyTorch's CPU build:
#   make test PIP_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu"
# The versions are those in constraints.txt. If pip cannot install one of them, pass an edited copy of the file, or
# nothing for the newest versions:
#   make quickstart CONSTRAINTS=my.txt
#   make quickstart CONSTRAINTS=
PYTHON ?= python3
PIP_OPTIONS ?=
# Neighboring tests stay in one process until another process is idle, because they share fixtures.
PYTEST_OPTIONS ?= --numprocesses auto --dist worksteal
TORCH ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt

VENV := .venv
BIN := $(VENV)/bin
# Environment variables, because pip's -c does not apply to the packages that build the project. For these, pip before
# 25.3 reads the first variable, and later versions read the second.
CONSTRAIN = $(if $(CONSTRAINTS),PIP_CONSTRAINT='$(CONSTRAINTS)' PIP_BUILD_CONSTRAINT='$(CONSTRAINTS)')
PIP_INSTALL = $(CONSTRAIN) $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) \
  $(if $(CONSTRAINTS),,--upgrade --upgrade-strategy eager)

.PHONY: quickstart train-digits finetune-digits test test-fast test-lowest sanitize lint docs notebook pictures constraints clean FORCE

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
	$(BIN)/python -m pytest -m "not slow and not ci" $(PYTEST_OPTIONS)

test-lowest: $(BIN)/uv
	$(BIN)/uv pip compile --quiet --python $(BIN)/python --only-binary :all: --resolution lowest-direct \
	  --no-header --no-annotate --extra cpu --extra dev pyproject.toml > $(VENV)/lowest.txt
	$(MAKE) test-fast VENV=.venv-lowest CONSTRAINTS=$(VENV)/lowest.txt

sanitize: $(VENV)/.dev
	$(BIN)/python scripts/sanitize.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

# A stale page or image must not hide a broken link, so the output folder is removed first.
docs: $(VENV)/.dev
	rm -rf docs/_build
	$(BIN)/python -m sphinx -n -W --keep-going -q docs docs/_build/html
	@echo "the site is docs/_build/html/index.html"

notebook: $(VENV)/.dev
	cd docs && JUPYTER_PREFER_ENV_PATH=1 ../$(BIN)/jupyter execute --inplace tutorial.ipynb

pictures: $(VENV)/.dev
	FCVIT_ALL_TESTS=1 FCVIT_SCREENSHOTS=docs/images $(BIN)/python -m pytest -q tests/commands/test_demo.py -k overlays
	$(BIN)/python scripts/draw_pictures.py $(if $(RUN),--run '$(RUN)') \
	  $(if $(DETECTOR),--detector '$(DETECTOR)' --instances '$(INSTANCES)')

# One version for all Python versions and systems, with wheels for each Python version on Linux. PyTorch and the
# packages that it pins are left out: TORCH selects them.
constraints: $(BIN)/uv
	printf '%s\n' '$(TORCH)' hatchling editables uv > $(VENV)/others.txt
	$(BIN)/uv pip compile --quiet --universal --fork-strategy fewest --python-version 3.11 \
	  --no-header --no-annotate --extra cpu --extra dev pyproject.toml $(VENV)/others.txt > $(VENV)/all.txt
	grep -vE '^(torch|triton|nvidia-|cuda-)' $(VENV)/all.txt > $(VENV)/newest.txt
	for version in 3.11 3.12 3.13; do \
	  $(BIN)/uv pip compile --quiet --only-binary :all: --python-platform linux --python-version $$version \
	    --constraints $(VENV)/newest.txt --extra cpu --extra dev pyproject.toml > $(VENV)/all.txt || exit 1; \
	done
	$(MAKE) lint test CONSTRAINTS=$(VENV)/newest.txt
	{ echo '# The versions that passed lint and all tests, by `make constraints`.'; cat $(VENV)/newest.txt; } > $@.txt

clean:
	rm -rf $(VENV) .venv-lowest dist docs/_build .pytest_cache .hypothesis .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11 to 3.13 is needed, $(PYTHON) is not; choose one with make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }  # an incomplete one would look complete

# One stamp per set of packages. They are installed again when the project's metadata, the versions or the settings change.
$(VENV)/.cpu: pyproject.toml $(CONSTRAINTS) $(VENV)/.settings
	$(PIP_INSTALL) --editable '.[cpu,dense,report]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) $(VENV)/.settings
	$(PIP_INSTALL) --editable '.[cpu,dev]' '$(TORCH)'
	@touch $@ $(VENV)/.cpu

$(VENV)/.settings: FORCE | $(VENV)/bin/python
	@echo '$(CONSTRAINTS) $(TORCH)' | cmp -s - $@ || echo '$(CONSTRAINTS) $(TORCH)' > $@

$(BIN)/uv: | $(VENV)/bin/python
	$(PIP_INSTALL) uv
