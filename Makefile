# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
#
#   make install   .venv with everything; TORCH_INDEX=https://… takes torch from another index (say, its CPU builds)
#   make demo      export the example twins, serve them, classify a sentence, prove that they are equally fast
#   make serve     the twins on http://127.0.0.1:8000, until Ctrl-C
#   make test      the whole suite
#   make check     ruff and mypy
#   make chart     lint, render and check the Helm chart; make chart-golden writes k8s/rendered anew
#   make chaos     break the service in every way there is, in ten minutes
#   make image     build both images without a container engine and run them as Kubernetes would
#   make prometheus  scrape real arms by a real Prometheus under the chart's rules
#   make bench     every benchmark of the CPU service, in ten minutes
#   make clean     what make made, but for .venv and the evidence: runs are not forgotten

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
PIP := sh install.sh $(BIN)/python --quiet
CHECKPOINTS := examples/checkpoints
ARTIFACTS := artifacts/bert artifacts/drbert artifacts/drbert-with-decoder

.PHONY: install demo serve test check chart chart-golden image prometheus bench chaos clean
.DELETE_ON_ERROR:

install: .venv/.installed

# torch first and by itself: a plain requirement would take the newest build, with gigabytes of CUDA.
.venv/.installed: pyproject.toml constraints.txt tests/k8s/requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	@# Triton's client, for the tests of its dialect: it forbids newer greenlet and ml_dtypes than it works with.
	$(PIP) --no-deps tritonclient==2.73.0
	$(PIP) --no-deps --require-hashes --requirement tests/k8s/requirements.txt
	@touch $@

demo: install $(ARTIFACTS:=/manifest.json)
	@BIN=$(BIN) sh examples/demo.sh

serve: install $(ARTIFACTS:=/manifest.json)
	$(BIN)/python -m service bert=artifacts/bert drbert=artifacts/drbert

artifacts/bert/manifest.json: $(CHECKPOINTS)/bert-mini-sst2/model.safetensors | install
	$(BIN)/python -m export $(CHECKPOINTS)/bert-mini-sst2 artifacts/bert

artifacts/drbert/manifest.json: $(CHECKPOINTS)/drbert-mini-sst2/model.safetensors | install
	$(BIN)/python -m export $(CHECKPOINTS)/drbert-mini-sst2 artifacts/drbert

artifacts/intents/manifest.json: $(CHECKPOINTS)/drbert-mini-clinc150/model.safetensors | install
	$(BIN)/python -m export $(CHECKPOINTS)/drbert-mini-clinc150 artifacts/intents

artifacts/drbert-with-decoder/manifest.json: $(CHECKPOINTS)/drbert-mini-sst2/model.safetensors | install
	$(BIN)/python -m export $(CHECKPOINTS)/drbert-mini-sst2 artifacts/drbert-with-decoder --keep-decoder

.venv/.debian: tests/debian.sh .venv/.prometheus | install
	@# Where something could not be had, the next make asks again.
	@if sh tests/debian.sh $(BIN) programs; then touch $@; fi

.venv/.prometheus: tests/debian.sh | install
	@if sh tests/debian.sh $(BIN) prometheus; then touch $@; fi

# Grafana's own types, which hold the dashboards where node is.
.venv/.grafana: | install
	@if command -v npm >/dev/null; then \
		if npm install --silent --no-audit --no-fund --no-package-lock --ignore-scripts --prefix .venv/grafana @grafana/schema@13.2.3 typescript@5.9.3; \
		then touch $@; else echo "@grafana/schema cannot be had from npm; the test that needs it is skipped"; fi; \
	fi

bench: install .venv/.debian
	$(BIN)/python -m benchmarks all --short

chaos: install
	$(BIN)/python -m tests.chaos

test: install .venv/.debian .venv/.grafana
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/mypy

# All of tests/k8s but what builds images and starts Prometheus, which have targets of their own.
chart: install .venv/.prometheus .venv/.grafana
	$(BIN)/python -m pytest tests/k8s --ignore tests/k8s/test_image.py --ignore tests/k8s/test_prometheus.py

chart-golden: install
	$(BIN)/python -m tests.k8s.golden

image: install .venv/.debian artifacts/bert/manifest.json artifacts/drbert/manifest.json
	$(BIN)/python -m pytest tests/k8s/test_image.py

prometheus: install .venv/.debian $(ARTIFACTS:=/manifest.json)
	$(BIN)/python -m pytest tests/k8s/test_prometheus.py

clean:
	@# What an interrupted build of images left mounted.
	@[ ! -d build/image/store ] || awk -v ours="$(CURDIR)/build/image/" 'index($$2, ours) == 1 { print $$2 }' /proc/mounts | sort -r | xargs -r umount
	rm -rf artifacts build .mypy_cache .pytest_cache .ruff_cache
