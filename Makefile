# Seven words: demo, test, check, fmt, docs, peers, clean.  The first two create the environment themselves.
PYTHON ?= python3
BIN := .venv/bin

PEERS := hqq sinq llmcompressor auto-round

.PHONY: demo test check fmt docs peers clean

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

# other people's quantizers, each in an environment of its own: `tersely bench quantize MODEL --peers bench/peers`.
# One that does not install stops none of the others; its install.log says why, and so does its row.
peers:
	$(MAKE) --keep-going --no-print-directory $(PEERS:%=.peers/%/installed)

# torch first and by its exact version: a plain one brings gigabytes for graphics cards.  Torchvision and torchaudio,
# which packages bring along and none of the scripts uses, are built for such cards and break transformers without one.
.peers/%/installed: bench/peers/%.txt bench/peers/torch.txt
	test -x .peers/$*/bin/python || $(PYTHON) -m venv .peers/$*
	.peers/$*/bin/python -m pip install --disable-pip-version-check --requirement bench/peers/torch.txt \
		> .peers/$*/install.log 2>&1
	.peers/$*/bin/python -m pip install --disable-pip-version-check --constraint bench/peers/torch.txt \
		--requirement $< >> .peers/$*/install.log 2>&1
	.peers/$*/bin/python -m pip uninstall --yes torchvision torchaudio >> .peers/$*/install.log 2>&1
	touch $@

clean:
	rm -rf .venv .peers build demo-out
