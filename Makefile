# `make demo` needs Python 3.11 with pip, and nothing else. Hubs are never contacted: models and data are in the repository.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt

export HF_HUB_OFFLINE := 1

.PHONY: demo test lint clean

demo: $(VENV)/train.stamp
	$(BIN)/trimtab train recipes/words.yaml
	$(BIN)/trimtab generate cat --adapter runs/words

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment for both: each stamp is as old as the last install of its extras.
$(VENV)/train.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[train]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[train,dev]'
	touch $(VENV)/train.stamp $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
