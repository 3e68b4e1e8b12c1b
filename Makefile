# `make demo` and `make test` work from a bare clone: they create .venv and install what is missing, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
WORLD ?= ../shared/data

.PHONY: venv demo test test-slow test-kills check docs format bench clean

venv: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lodeset needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(STAMP)

demo: venv
	$(BIN)/lodeset demo demo

# On two processes, each of which runs the tests of whole files. PROCESSES=0: in one, with output as it comes (-s) and a debugger.
PROCESSES ?= 2

test: venv
	$(BIN)/python -m pytest -m "not slow and not gpu" -n $(PROCESSES) --dist loadfile

# Kills, restarts and whole runs. Files whose tests share a run stay in one process.
test-slow: venv
	$(BIN)/python -m pytest -m "slow and not kills and not gpu" -n $(PROCESSES) --dist loadgroup --durations 25

# Forty kills at drawn moments, of drivers, workers and whole Ray nodes; it prints a table.
test-kills: venv
	$(BIN)/python -m pytest -m kills

# Lint, types, and the direction of imports.
check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

# The documentation as a site, in build/site. A broken link or reference stops it.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The speed claims, each a ratio measured in one run. WORLD is a folder with pool.tar and an embedder (see benchmarks/).
bench: venv
	$(BIN)/python benchmarks/ingest.py $(WORLD)/world/pool.tar
	$(BIN)/python benchmarks/embed.py $(WORLD)/world/pool.tar $(WORLD)/weights/mobilenet_v2.onnx
	$(BIN)/python benchmarks/world.py $(WORLD)
	$(BIN)/python benchmarks/demo.py

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache build *.egg-info
