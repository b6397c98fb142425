# Everything runs from a virtual environment in .venv, made on first use.
VENV ?= .venv
JOBS ?= 2
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test test-slow test-lowest lint emoji-world setup

setup: $(READY)

$(READY): pyproject.toml
	python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -e ".[dev,ocr,server]"
	touch $@

# A search, a training run and a hacked run on the CPU, in five minutes, on one page.
demo: $(READY)
	$(PY) -m diffalign demo runs/demo

# As many processes as JOBS, one thread each.
test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n $(JOBS)

# Also the tests that take longer than a minute or several processes.
test-slow: $(READY)
	$(PY) -m pytest

# The lower bounds of pyproject.toml, in an environment of their own.
test-lowest:
	python3 -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet pytest -r tests/lowest.txt
	.venv-lowest/bin/python -m pytest -m "not slow"

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

# Rebuild assets/emoji-* from nothing (hours on two cores; goes on where it stopped).
emoji-world: $(READY)
	bash diffalign/emoji_world/workshop/build.sh
