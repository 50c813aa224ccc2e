# `make demo`, `make test` and `make check` do their own set-up: a virtual environment in .venv, pinned versions.
PYTHON ?= python3
VENV := .venv
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two processes, whatever the machine has: each holds some 400 MiB, and so do the scripts that it runs.
PYTEST := $(VENV)/bin/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-slow check clean

demo: $(VENV)/.installed
	$(VENV)/bin/python example.py

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

# What `make test` leaves out. `pytest` alone runs everything, in one process.
test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python tools/check_prose.py
	$(VENV)/bin/python tools/check_prose.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) --editable .[dev]
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
