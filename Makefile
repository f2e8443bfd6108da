# Six words: demo, test, check, fmt, docs, clean.  The first two create the environment themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check fmt docs clean

.venv/installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: .venv/installed
	$(BIN)/tersely demo demo-out

# one thread a worker: two workers with two threads each are slower than either
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fmt: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/installed
	$(BIN)/tersely list --markdown > docs/methods.md

clean:
	rm -rf .venv build demo-out
