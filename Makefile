# One gate, the same on a laptop and in CI. `make demo` and `make test` need nothing but Python >= 3.11 and pip.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# Nothing here reaches for the hub. Test workers are processes: threads within each would fight over the cores.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Building the documentation prints an announcement of its theme otherwise.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
# Each worker begins with half of the tests in a row, so that what a module's tests share is made once. Whoever is done
# first takes over half of what is left.
SPREAD := -n $(WORKERS) --dist worksteal
PYTEST := $(OFFLINE) OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-long interpreters journey browser test-gpu soak tried lint format docs clean

help:
	@echo "make demo       train on the embedded world and write a report"
	@echo "make test       format, lint, types, import contract, tests, docs"
	@echo "make test-long  tests that take minutes: kills, ranks, fuzzing, parity"
	@echo "make interpreters  the short tests on each of Python 3.11, 3.12 and 3.13 that is there"
	@echo "make journey    a new user's way on each of them: an empty environment, the built wheel, the documents' commands"
	@echo "make test-gpu   tests of what runs on a GPU only"
	@echo "make soak       streaming in flat memory, fuzzing, and every architecture and adapter of docs/tried.md (an hour or more)"
	@echo "make tried      write docs/tried.md: what comes of every architecture, adapter and shape of data (minutes)"
	@echo "make lint       the first four of make test"
	@echo "make format     rewrite the code in the project's format"
	@echo "make docs       write the tables of settings, and build the documentation into site/"
	@echo "make clean      remove the environment, caches and everything built"

demo: $(VENV)/demo.stamp
	$(OFFLINE) $(BIN)/infopo demo

test: lint
	$(PYTEST) -m "not long and not gpu and not soak" $(SPREAD)
	$(MKDOCS) --quiet

test-long: $(VENV)/dev.stamp browser
	$(PYTEST) -m "long and not gpu and not soak" $(SPREAD)

# An environment for each interpreter that is found, by name or among pyenv's. What is not there is said and passed over.
interpreters:
	@for version in 3.11 3.12 3.13; do \
		python=; \
		for found in python$$version $$HOME/.pyenv/versions/$$version.*/bin/python; do \
			"$$found" -c 'import sys' 2>/dev/null && python=$$found; \
		done; \
		test -n "$$python" || { echo "Python $$version is not here"; continue; }; \
		venv=.venv-$$version; \
		echo "== Python $$version"; \
		test $$venv/dev.stamp -nt pyproject.toml || { "$$python" -m venv $$venv && \
			$$venv/bin/python -m pip install --quiet -c constraints.txt torch && \
			$$venv/bin/python -m pip install --quiet -c constraints.txt -e '.[test]' && touch $$venv/dev.stamp; } || exit 1; \
		$(OFFLINE) OMP_NUM_THREADS=1 $$venv/bin/python -m pytest -m "not long and not gpu and not soak" $(SPREAD) || exit 1; \
	done

# Nothing of the checkout is on the way but the wheel. PIP_CONSTRAINT=$PWD/constraints.txt takes the pinned versions.
journey:
	$(PYTHON) scripts/journey.py

# The report is tested in a browser. Where none can be installed, its tests are skipped and say so.
browser:
	@command -v chromium > /dev/null || command -v google-chrome > /dev/null || \
		{ command -v apt-get > /dev/null && [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -y -q chromium; } || \
		echo "no Chromium is installed (on Debian: apt-get install chromium): the report is not tested in a browser"

test-gpu: $(VENV)/dev.stamp
	$(PYTEST) -m gpu

soak: $(VENV)/dev.stamp
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python scripts/soak_stream.py --rows 10000000 \
		--out benchmarks/results/soak_stream.json
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python scripts/fuzz.py --inputs 20000 --out benchmarks/results/fuzz.json
	$(PYTEST) -m "soak and not gpu" $(SPREAD)

tried: $(VENV)/dev.stamp
	cd tests && $(OFFLINE) OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m tried

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/dev.stamp
	$(BIN)/python scripts/recipe_tables.py
	$(MKDOCS)

clean:
	rm -rf $(VENV) .venv-3.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist site
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that an index chosen for it (CPU, CUDA) is not asked for anything else.
$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "infopo needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) install -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/demo.stamp
