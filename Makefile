# make demo     prune the built-in model on a built-in task
# make test     lint, type check and tests
# make rare     the tests that make test leaves out, because they take long and guard what seldom changes
# make check    lint, type check and the fast tests
# make lint     ruff and mypy alone
# make soak     tests of reliability by the hundred, for MINUTES, continued where they stopped
# make bench    speed of the file format (prints, checks nothing)
# make docs     write the generated pages of docs/reference again
# make clean    remove caches and build outputs; .venv and runs stay

PYTHON ?= python3
BIN := .venv/bin
DEMO_OUT := runs/demo
MINUTES ?= 60
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test rare check lint soak bench docs clean

demo: .venv/.installed
	$(BIN)/cap prune mini --task banking77 --sparsity 0.9 --preset quick --method fisher --epochs 1 --teacher-lr 6e-4 --max-train-samples 5000 --max-eval-samples 1500 -o $(DEMO_OUT)
	rm -rf $(DEMO_OUT)-int8
	$(BIN)/cap export $(DEMO_OUT) --to sparse --dtype int8 --embeddings int8 -o $(DEMO_OUT)-int8 --quiet
	$(BIN)/cap eval $(DEMO_OUT)-int8 --runtime auto --quiet --json > $(DEMO_OUT)-int8/eval.json
	@$(BIN)/python scripts/demo_table.py $(DEMO_OUT)/report.json $(DEMO_OUT)-int8/eval.json
	@echo "report: $(CURDIR)/$(DEMO_OUT)/report.html"

test: lint
	$(PYTEST) -m "not rare"

rare: .venv/.installed-dev
	$(PYTEST) -m rare

check: lint
	$(PYTEST) -m "not slow and not rare"

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --minutes $(MINUTES)

bench: .venv/.installed-dev
	$(BIN)/python benchmarks/sparse.py

docs: .venv/.installed-dev
	$(BIN)/python scripts/make_reference.py

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find capcli tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: the installation is repeated only when what it reads has changed.

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e '.[fast,onnx]'
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e '.[dev]'
	@touch $@
	@touch .venv/.installed
