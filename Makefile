# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
#
#   make install   .venv with everything; TORCH_INDEX=https://… takes torch from another index (say, its CPU builds)
#   make demo      export the example twins, serve them, classify a sentence, prove that they are equally fast
#   make serve     the twins on http://127.0.0.1:8000, until Ctrl-C
#   make test      the whole suite
#   make check     ruff and mypy
#   make chart     lint, render and check the Helm chart; make chart-golden writes k8s/rendered anew
#   make chaos     break the service in every way there is, in ten minutes
#   make bench     every benchmark of the CPU service, in ten minutes
#   make clean     what make made, but for .venv and the evidence: runs are not forgotten

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
CHECKPOINTS := examples/checkpoints
ARTIFACTS := artifacts/bert artifacts/drbert artifacts/drbert-with-decoder

.PHONY: install demo serve test check chart chart-golden bench chaos clean
.DELETE_ON_ERROR:

install: .venv/.installed

# torch first and by itself: a plain requirement would take the newest build, with gigabytes of CUDA.
.venv/.installed: pyproject.toml constraints.txt tests/k8s/requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@# Triton's client, for the tests of its dialect: it forbids newer greenlet and ml_dtypes than it works with.
	$(BIN)/python -m pip install --quiet --no-deps tritonclient==2.73.0
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement tests/k8s/requirements.txt
	@touch $@

demo: install $(ARTIFACTS:=/manifest.json)
	@BIN=$(BIN) sh examples/demo.sh

serve: install $(ARTIFACTS:=/manifest.json)
	$(BIN)/python -m service bert=artifacts/bert drbert=artifacts/drbert

artifacts/bert/manifest.json: $(CHECKPOINTS)/bert-mini-sst2/model.safetensors | install
	$(BIN)/python -m export $(CHECKPOINTS)/bert-mini-sst2 artifacts/bert

artifacts/drbert/manifest.json: $(CHECKPOINTS)/drbert-mini-sst2/model.safetensors | install
	$(BIN)/python -m export $(CHECKPOINTS)/drbert-mini-sst2 artifacts/drbert

artifacts/drbert-with-decoder/manifest.json: $(CHECKPOINTS)/drbert-mini-sst2/model.safetensors | install
	$(BIN)/python -m export $(CHECKPOINTS)/drbert-mini-sst2 artifacts/drbert-with-decoder --keep-decoder

# What some tests need of Debian. Where it cannot be had they are skipped, and say what for.
.venv/.debian: | install
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! { command -v wrk && command -v chromium; } >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends wrk chromium >/dev/null || echo "wrk and chromium cannot be installed; the tests that need them are skipped"; \
	fi
	@touch $@

bench: install .venv/.debian
	$(BIN)/python -m benchmarks all --short

chaos: install
	$(BIN)/python -m tests.chaos

test: install .venv/.debian
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/mypy

# All of tests/k8s but what builds images and starts Prometheus.
chart: install .venv/.debian
	$(BIN)/python -m pytest tests/k8s --ignore tests/k8s/test_image.py --ignore tests/k8s/test_prometheus.py

chart-golden: install
	$(BIN)/python -m tests.k8s.golden

clean:
	rm -rf artifacts build .mypy_cache .pytest_cache .ruff_cache
