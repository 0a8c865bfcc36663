# Two commands for a fresh machine with Python >= 3.11, pip and make:
#   make demo   the recommended recipe on the sandbox model: protect, attack, judge, and write demo/report.html
#   make test   every check the project has
#   make docs   the documentation, in build/site
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test docs lint setup clean

demo: $(VENV)/ready
	$(BIN)/safeweights demo -o demo --overwrite

test: lint
	$(BIN)/python -m pytest -n auto

docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch>=2.6,<2.14"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) demo build/site
