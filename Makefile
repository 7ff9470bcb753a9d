# `make train` and `make test` work from a fresh clone with Python >= 3.11, pip and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed
RUN := . $(VENV)/bin/activate &&

.PHONY: train test test-slow lint base clean

train: $(INSTALLED)
	$(RUN) accelerate launch training/train.py recipe=late_fusion

test: $(INSTALLED)
	$(RUN) OMP_NUM_THREADS=1 python -m pytest -n 2

test-slow: $(INSTALLED)
	$(RUN) OMP_NUM_THREADS=1 python -m pytest -m slow -n 2 --dist loadfile

lint: $(INSTALLED)
	$(RUN) ruff check . && ruff format --check . && mypy

# Trains the embedded base model from nothing (about 20 CPU minutes); its result is already in the repository.
base: $(INSTALLED)
	$(RUN) python models/embedded/train_base.py

# torch comes first: the constraint pins the tested build before any other package can ask for it.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
