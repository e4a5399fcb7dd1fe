# Everything runs in .venv, made by the first target that needs it: python3, make and a package index are enough.
# To test another torch:  make test TORCH=torch==2.9.1        To choose the Python:  make test PYTHON=python3.12

TESTED_TORCH := $(shell grep '^torch==' constraints.txt)
TORCH ?= $(TESTED_TORCH)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
STAMP := $(VENV)/installed
DOCS_STAMP := $(VENV)/installed-docs
INTEGRATIONS_STAMP := $(VENV)/installed-integrations
CONSTRAINTS := $(VENV)/constraints.txt

# The stamp holds the torch that was asked for; asking for another one installs again.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(TORCH))
.PHONY: $(STAMP)
endif
.PHONY: help demo test test-integrations docs clean

help:
	@echo "make demo   compare the optimizers on a small language model"
	@echo "make test   lint, type-check and test"
	@echo "make test-integrations   train and resume with trainers, and on several ranks"
	@echo "make docs   build the documentation into docs/_build"
	@echo "make clean  remove everything that the other targets made, except $(VENV)"

demo: $(STAMP)
	@$(BIN)/python -m benchmarks convergence --preset demo

test: $(STAMP)
	@echo "Linting"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "Run $(BIN)/ruff format ." >&2; exit 1; }
	@echo "Checking types"
	@$(BIN)/mypy
	@echo "Testing"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

test-integrations: $(INTEGRATIONS_STAMP)
	@echo "Testing with trainers and on several ranks"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup tests/integrations

docs: $(DOCS_STAMP)
	@echo "Building the documentation"
	@$(BIN)/python -m sphinx -W -n --keep-going --quiet docs docs/_build
	@echo "Open docs/_build/index.html"

clean:
	@rm -rf build dist docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name $(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# torch comes first, and the constraints then hold it, so that no dependency replaces the build that was chosen. The
# tested triton belongs to the tested torch: another torch brings its own.
$(STAMP): pyproject.toml constraints.txt
	@rm -f $(STAMP) $(DOCS_STAMP) $(INTEGRATIONS_STAMP)
	@test -x $(BIN)/pip || { $(find_python) && echo "Creating $(VENV) with $$($$python --version)" && \
		$$python -m venv --clear $(VENV); }
	@echo "Installing $(TORCH), which may be a large download"
	@$(PIP) install "$(TORCH)"
ifeq ($(TORCH),$(TESTED_TORCH))
	@cp constraints.txt $(CONSTRAINTS)
else
	@grep -vE '^(torch|triton)==' constraints.txt > $(CONSTRAINTS)
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> $(CONSTRAINTS)
endif
	@echo "Installing deep_optim and what its tests and benchmarks need"
	@$(PIP) install --constraint $(CONSTRAINTS) --editable ".[bench,dev]"
	@echo "$(TORCH)" > $(STAMP)

$(DOCS_STAMP): $(STAMP)
	@echo "Installing the documentation builder"
	@$(PIP) install --constraint $(CONSTRAINTS) --editable ".[docs]"
	@touch $(DOCS_STAMP)

$(INTEGRATIONS_STAMP): $(STAMP)
	@echo "Installing the trainers"
	@$(PIP) install --constraint $(CONSTRAINTS) --editable ".[hf,lightning]"
	@touch $(INTEGRATIONS_STAMP)

# Sets $$python to the first candidate that is new enough and can make environments.
define find_python
for python in $(PYTHON) python3.13 python3.12 python3.11 python3.10; do \
	$$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break; python=; \
done; \
{ test -n "$$python" || { echo "deep_optim needs Python 3.10 or newer, with its venv module (on Debian and Ubuntu the \
package python3-venv). Name one with: make PYTHON=/path/to/python3" >&2; exit 1; }; }
endef
