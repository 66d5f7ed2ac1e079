# `make train` and `make test` need nothing but Python 3.11 to 3.14 and make.

VENV := .venv
BIN := $(VENV)/bin
# The first interpreter on the path that runs and is of a version the project supports.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null && echo "$$p" && break; done)
# Fake devices share the machine's cores and may wait long for each other.
export XLA_FLAGS ?= --xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=1200

.PHONY: train test slow lint format docs wheel clean
.DEFAULT_GOAL := test

$(VENV)/.stamp: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.14 is needed; set PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

train: $(VENV)/.stamp
	$(BIN)/python examples/pretrain.py --check 3 --profile 1 $(ARGS)

test: $(VENV)/.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

slow: $(VENV)/.stamp
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(VENV)/.stamp
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# Tools of the site alone: the packages are read, not imported.
$(VENV)/.docs: $(VENV)/.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

# The site, after its code has run.
docs: $(VENV)/.docs
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m pages tests/test_readme.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)
	@echo "wrote site/index.html"

# Built, installed where nothing else is, and tried away from the checkout: every public name and command.
wheel: $(VENV)/.stamp
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check build/wheel/*.whl
	cd build/wheel && venv/bin/python -W error ../../.ci/import_names.py ../../docs/api
	cd build/wheel && for tool in jaxpipe eplb-jax jaxpipe-profiling; do venv/bin/$$tool --help >/dev/null || exit 1; done

clean:
	rm -rf $(VENV) build site *.egg-info
