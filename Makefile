# `make train` and `make test` work from a fresh clone with Python >= 3.11, pip and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed
RUN := . $(VENV)/bin/activate &&
ON_GPU := --device cuda --dtype bfloat16

.PHONY: train test test-slow gpu lint base clean

train: $(INSTALLED)
	$(RUN) accelerate launch training/train.py recipe=late_fusion

test: $(INSTALLED)
	$(RUN) CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 python -m pytest -n 2

test-slow: $(INSTALLED)
	$(RUN) CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 python -m pytest -m slow -n 2 --dist loadfile

# Everything that waits for a GPU: its tests, and the benchmarks at LLaVA-1.5-7B's shape. The environment needs a torch with CUDA.
gpu:
	-python -m pytest -m gpu
	python eval/bench/executor.py --layers 32 --hidden 4096 $(ON_GPU) --json outputs/gpu/executor.json
	python eval/bench/inference.py --shape llava-1.5-7b $(ON_GPU) --json outputs/gpu/inference.json
	python eval/bench/training.py --shape llava-1.5-7b $(ON_GPU) --batch 8 --json outputs/gpu/training.json

lint: $(INSTALLED)
	$(RUN) ruff check . && ruff format --check . && mypy

# Trains the embedded base model from nothing (about 20 CPU minutes); its result is already in the repository.
base: $(INSTALLED)
	$(RUN) python training/embedded/train_base.py

# torch comes first: the constraint pins the tested build before any other package can ask for it.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
