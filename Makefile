# Everything here works in .venv, which the first command makes: `make PYTHON=python3.12 test` takes another Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install

.PHONY: help install quickstart test test-gpu test-slurm test-browser lint docs
.DEFAULT_GOAL := help

help:  ## Show what can be made.
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

install: $(VENV)/run.stamp  ## Make .venv and install into it; the others do so too.

quickstart: $(VENV)/run.stamp  ## Train a small model on the Python standard library's source, on a CPU.
	$(BIN)/loglinear train configs/quickstart.yaml

test: $(VENV)/test.stamp  ## Run all tests but SLURM's and a browser's; those for a GPU are skipped without one.
	$(BIN)/python -m pytest -m "not slurm and not browser" -n 2 --dist loadfile --no-loadscope-reorder

test-gpu: $(VENV)/test.stamp  ## Run the tests that need a CUDA GPU.
	$(BIN)/python -m pytest -m gpu

test-slurm: $(VENV)/test.stamp  ## Run the tests on a SLURM of four nodes here; root on Debian or Ubuntu, else skipped.
	@tests/slurm/install.sh
	$(BIN)/python -m pytest -m slurm tests/slurm

test-browser: $(VENV)/browser.stamp  ## Look at TensorBoard in Chromium, which root gets on Debian or Ubuntu; else skipped.
	@tests/install_browser.sh
	$(BIN)/python -m pytest -m browser tests/train tests/launch

lint: $(VENV)/dev.stamp  ## Check style and formatting (ruff), types (pyright), Dockerfiles (hadolint).
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/hadolint docker/Dockerfile*

docs: $(VENV)/docs.stamp  ## Build the documentation's site into build/site; a link that leads nowhere is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "The site begins at build/site/index.html."

# A stamp says that an installation succeeded, and is older than pyproject.toml once that changes.
$(VENV)/run.stamp: EXTRA :=
$(VENV)/docs.stamp: EXTRA := [docs]
$(VENV)/test.stamp: EXTRA := [test]
$(VENV)/browser.stamp: EXTRA := [browser]
$(VENV)/dev.stamp: EXTRA := [dev]
$(VENV)/%.stamp: pyproject.toml | $(BIN)/pip
	@echo "Installing loglinear$(EXTRA) into $(VENV); the first time that takes a few minutes."
	$(PIP) --editable '.$(EXTRA)'
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c '' 2>/dev/null || { echo "There is no $(PYTHON) here: install Python 3.11 or later," \
		"or name one, such as make PYTHON=python3.12." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "loglinear needs Python 3.11 or later," \
		"but $(PYTHON) is $$($(PYTHON) --version 2>&1): name another, such as make PYTHON=python3.12." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make a virtual environment:" \
		"on Debian or Ubuntu, apt install python3-venv." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
