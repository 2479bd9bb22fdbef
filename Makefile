# Both targets do all their set-up; nothing is compiled and nothing needs root.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint format setup clean

demo: $(INSTALLED)  ## train a small BLOOM on this machine, from text to export (about 3 minutes)
	$(VENV)/bin/anthesis demo

test: $(INSTALLED)  ## run all tests
	$(VENV)/bin/python -m pytest

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

setup: $(INSTALLED)  ## only install, into .venv

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	@# LAMB and LARS of timm are references in tests; they need nothing of what timm asks for. In a
	@# place of its own, since `accelerate` would take it for whole.
	$(VENV)/bin/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/references timm==1.0.31
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
