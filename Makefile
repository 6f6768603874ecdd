# Two commands do everything: `make demo` and `make test`. Each sets the environment up first, once.
#
#   TORCH_INDEX_URL   package index for torch (a CPU or CUDA one); unset: the default index
#   PYTHON            interpreter to build the environment with (3.11 or newer)
#   RUN_ROOT          where runs are kept; default: runs/ of this checkout

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export RUN_ROOT ?= $(CURDIR)/runs
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions
# Neither hubs nor usage statistics are asked for anything.
export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export MLFLOW_DISABLE_TELEMETRY ?= true

.PHONY: help setup demo demo-ldm-variants demo-unclip demo-gan demo-gan-variants demo-lifecycle bench test test-fast lint clean

help:
	@echo "make demo       train the demo: autoencoder, text encoder, latent diffusion, pictures, report (7 minutes on 2 cores)"
	@echo "make demo-ldm-variants   denoisers, prediction types and regularisers compared, trained side by side (15 minutes on 2 cores)"
	@echo "make demo-unclip         CLIP, priors, decoder, upsampler: from a sentence to a picture through all (16 minutes on 2 cores)"
	@echo "make demo-gan            a GAN from sentences, set beside latent diffusion (under 10 minutes on 2 cores)"
	@echo "make demo-gan-variants   every loss and network of GANs, image to image, few labels, AttnGAN (under 20 minutes on 2 cores)"
	@echo "make demo-lifecycle      search, promotion, retraining, poisoned data, rollback, on a cluster in a box (25 minutes on 2 cores)"
	@echo "make test       lint, types and all tests (about 33 minutes on 2 cores)"
	@echo "make test-fast  what runs without Ray and without training (under 3 minutes)"
	@echo "make bench      what the machinery costs, side by side with the bare thing (under 20 minutes on 2 cores)"
	@echo "make lint       ruff and mypy"
	@echo "make clean      remove runs/ and out/ (the environment is kept)"

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL),) "torch~=2.13.0"
	$(BIN)/python -m pip install --quiet -e ".[test]"
	$(BIN)/python infra/build_extensions.py
	touch $(STAMP)

demo: setup
	$(BIN)/python pipelines/demo/run.py --out out/demo.json

demo-unclip: setup
	$(BIN)/python pipelines/demo/unclip.py --out out/demo-unclip.json

demo-gan: setup
	$(BIN)/python pipelines/demo/gan.py --out out/demo-gan.json

demo-gan-variants: setup
	$(BIN)/python pipelines/demo/gan_variants.py --out out/demo-gan-variants.json

demo-lifecycle: setup
	$(BIN)/python pipelines/demo/lifecycle.py --out out/demo-lifecycle.json

demo-ldm-variants: setup
	$(BIN)/python pipelines/demo/variants.py --out out/demo-ldm-variants.json

bench: setup
	$(BIN)/python tests/benchmarks/run.py --out out/bench.json

test: setup lint
	$(BIN)/python -m pytest

test-fast: setup
	$(BIN)/python -m pytest -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf runs out
