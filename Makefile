# `make demo` and `make test` are all the set-up a fresh machine with Python 3.11 to 3.14 needs.
PYTHON ?= python3
VENV := .venv
INSTALL := $(VENV)/bin/pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: setup demo test test-all lint study clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(VENV)/bin/dpt run configs/digits.yaml

study: $(VENV)/.installed
	$(VENV)/bin/dpt study configs/digits_study.yaml

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# All that needs no cluster of several processes, and one short run of the whole pipeline on Ray.
test: lint
	$(VENV)/bin/pytest -m "not cluster or smoke"

test-all: lint
	$(VENV)/bin/pytest

clean:
	rm -rf $(VENV) outputs
