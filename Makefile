# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
#
#   make install   create .venv with everything; TORCH_INDEX=https://… takes torch from another index, for example of CPU builds
#   make demo      export the two example models, serve them, classify a sentence, compare their latency
#   make proof-artifacts  make the folders of artifacts that the published plans name
#   make wheel     build the wheel in dist; `pip install dist/*.whl` installs it anywhere
#   make serve     serve the two example models on http://127.0.0.1:8000, until Ctrl-C
#   make test      run all tests
#   make quick     run the tests that need no torch and start no process
#   make coverage  run the tests of the service under coverage.py; fails below the floor
#   make check     run ruff (format and rules) and mypy
#   make chart     lint, render and check the Helm chart; make chart-golden writes k8s/rendered again
#   make chaos     inject faults into the service and count what becomes of each request, in ten minutes
#   make clients   test the service with the newest official clients of other servers
#   make image     build both images without a container engine and run them as Kubernetes would
#   make prometheus  scrape real arms with a real Prometheus and the chart's rules
#   make lock      write constraints.txt again: pyproject.toml's packages with their hashes; LOCK=--upgrade takes newer releases
#   make sbom      list the Python packages of the service's image and of .venv as CycloneDX in build/sbom; EXTRAS=gpu as for the image
#   make pin-base  pin the Dockerfile's base image to today's digest of its tag; needs skopeo and the image's registry
#   make bench     run every benchmark of the CPU service, in twelve minutes
#   make clean     remove what make created, except .venv and the evidence of runs

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
PIP := sh install.sh $(BIN)/python --quiet
SBOM := .venv/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --validate
CHECKPOINTS := examples/checkpoints
ARTIFACTS := artifacts/bert artifacts/drbert artifacts/drbert-with-decoder

.PHONY: install wheel demo proof-artifacts serve test quick coverage clients check chart chart-golden cluster image prometheus lock pin-base sbom bench chaos clean
.DELETE_ON_ERROR:

install: .venv/.installed

# Every package is checked against the hashes of constraints.txt. pip comes first, because older releases ignore hashes in constraints.
# torch has no hashes, because its builds differ by index. Its dependencies are installed before it, so that its index adds only torch and
# CUDA's libraries. CUDA's releases are torch's own, not those that constraints.txt names for the extra `gpu`.
.venv/.installed: pyproject.toml constraints.txt k8s/requirements.py tests/k8s/requirements.txt
	$(PYTHON) -m venv .venv
	@sed -n '/^pip==/,/[^\\]$$/p' constraints.txt >.venv/pip.txt
	@sed '/^nvidia-/,/[^\\]$$/d' constraints.txt >.venv/constraints.txt
	$(PIP) --require-hashes --requirement .venv/pip.txt
	$(PIP) --constraint .venv/constraints.txt filelock fsspec jinja2 networkx setuptools sympy typing-extensions
	$(PIP) torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@$(BIN)/python k8s/requirements.py dev >.venv/requirements.txt
	$(PIP) --constraint .venv/constraints.txt --requirement .venv/requirements.txt
	$(PIP) --no-deps --constraint .venv/constraints.txt tritonclient
	$(PIP) --no-deps --require-hashes --requirement tests/k8s/requirements.txt
	@# A folder has no hash. setuptools warns about folders with data and no modules.
	PYTHONWARNINGS=ignore $(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

demo: install $(ARTIFACTS:=/manifest.json)
	@BIN=$(BIN) sh examples/demo.sh

# Needs no environment: pip builds it in one of its own. setuptools warns about folders with data and no modules.
wheel:
	PYTHONWARNINGS=ignore $(PYTHON) -m pip --quiet wheel --no-deps --wheel-dir dist .

serve: install $(ARTIFACTS:=/manifest.json)
	$(BIN)/drbert-serve bert=artifacts/bert drbert=artifacts/drbert

# A proof loads each model from two folders. The base models have random weights.
proof-artifacts: install $(ARTIFACTS:=/manifest.json)
	for copy in copy third fourth; do cp -rT artifacts/bert artifacts/bert-$$copy; done
	cp -rT artifacts/drbert artifacts/drbert-copy
	test -d artifacts/random-base || $(BIN)/python -m benchmarks random_twins artifacts/random-base --variants cpu-fp32,cpu-bf16
	for copy in copy third fourth; do cp -rT artifacts/random-base/bert artifacts/random-base/bert-$$copy; done
	cp -rT artifacts/random-base/drbert artifacts/random-base/drbert-copy

artifacts/bert/manifest.json: $(CHECKPOINTS)/bert-mini-sst2/model.safetensors | install
	$(BIN)/drbert-export $(CHECKPOINTS)/bert-mini-sst2 artifacts/bert

artifacts/drbert/manifest.json: $(CHECKPOINTS)/drbert-mini-sst2/model.safetensors | install
	$(BIN)/drbert-export $(CHECKPOINTS)/drbert-mini-sst2 artifacts/drbert

artifacts/intents/manifest.json: $(CHECKPOINTS)/drbert-mini-clinc150/model.safetensors | install
	$(BIN)/drbert-export $(CHECKPOINTS)/drbert-mini-clinc150 artifacts/intents

artifacts/drbert-with-decoder/manifest.json: $(CHECKPOINTS)/drbert-mini-sst2/model.safetensors | install
	$(BIN)/drbert-export $(CHECKPOINTS)/drbert-mini-sst2 artifacts/drbert-with-decoder --keep-decoder

.venv/.debian: tests/debian.sh .venv/.prometheus | install
	@# If something could not be downloaded, the next make tries again.
	@if sh tests/debian.sh $(BIN) programs; then touch $@; fi

.venv/.prometheus: tests/debian.sh | install
	@if sh tests/debian.sh $(BIN) prometheus; then touch $@; fi

# Grafana's own types, which check the dashboards if node is installed.
.venv/.grafana: | install
	@if command -v npm >/dev/null; then \
		if npm install --silent --no-audit --no-fund --no-package-lock --ignore-scripts --prefix .venv/grafana @grafana/schema@13.2.3 typescript@5.9.3; \
		then touch $@; else echo "@grafana/schema cannot be installed from npm; the test that needs it is skipped"; fi; \
	fi

# The newest transformers, in parallel to the one that export uses: tests/export/test_corpus.py compares export with its checkpoints and answers.
.venv/.transformers5: tests/export/transformers5.txt install.sh | install
	@if $(PIP) --no-deps --require-hashes --no-warn-conflicts --upgrade --target .venv/transformers5 --requirement tests/export/transformers5.txt; then touch $@; \
		else echo "transformers 5 cannot be installed from PyPI; the tests that need it are skipped"; fi

bench: install .venv/.debian
	$(BIN)/python -m benchmarks all --short

chaos: install
	$(BIN)/python -m tests.chaos

clients: install
	$(BIN)/python -m tests.clients

test: install .venv/.debian .venv/.grafana .venv/.sbom .venv/.transformers5
	$(BIN)/python -m pytest

quick: install
	$(BIN)/python -m pytest --quick -q

# Branches count, and only those that run in the process of the tests.
coverage: install
	mkdir -p build
	$(BIN)/python -m coverage run -m pytest tests/service
	$(BIN)/python -m coverage report --show-missing --skip-covered --fail-under=90

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# All of tests/k8s except the tests that build images and start Prometheus, which have targets of their own.
chart: install .venv/.prometheus .venv/.grafana
	$(BIN)/python -m pytest tests/k8s --ignore tests/k8s/test_image.py --ignore tests/k8s/test_prometheus.py

chart-golden: install
	$(BIN)/python -m tests.k8s.golden

cluster: artifacts/bert/manifest.json artifacts/drbert/manifest.json
	sh k8s/cluster.sh

image: install .venv/.debian artifacts/bert/manifest.json artifacts/drbert/manifest.json
	$(BIN)/python -m pytest tests/k8s/test_image.py

prometheus: install .venv/.debian $(ARTIFACTS:=/manifest.json)
	$(BIN)/python -m pytest tests/k8s/test_prometheus.py

# Pinned releases do not change unless LOCK upgrades them.
lock: install
	$(PIP) --constraint constraints.txt --target build/lock --upgrade uv
	build/lock/bin/uv pip compile --quiet --system-certs --universal --python-version 3.11 --all-extras --group tools \
		--generate-hashes --no-annotate --no-emit-package torch --custom-compile-command 'make lock' $(LOCK) \
		--output-file constraints.txt pyproject.toml

pin-base:
	@sh k8s/pin_base.sh

# Outside the environment that it describes, because it brings packages of its own.
.venv/.sbom: .venv/.installed
	@if $(PYTHON) -m venv --without-pip .venv/sbom && PIP_PYTHON=.venv/sbom/bin/python $(PIP) --constraint constraints.txt cyclonedx-bom; \
		then touch $@; else echo "cyclonedx-bom cannot be installed; the test that needs it is skipped"; fi

# Installs the same packages as the Dockerfile's stage `requirements`.
sbom: install .venv/.sbom
	rm -rf build/sbom
	$(PYTHON) -m venv --without-pip build/sbom/environment
	@$(BIN)/python k8s/requirements.py $(EXTRAS) >build/sbom/requirements.txt
	PIP_PYTHON=build/sbom/environment/bin/python $(PIP) --constraint constraints.txt --requirement build/sbom/requirements.txt
	$(BIN)/pip --quiet --python build/sbom/environment/bin/python uninstall --yes openvino-telemetry
	$(SBOM) --output-file build/sbom/service.json build/sbom/environment/bin/python
	$(SBOM) --output-file build/sbom/full.json $(BIN)/python
	rm -r build/sbom/environment build/sbom/requirements.txt

clean:
	@# Unmount what an interrupted build of images left mounted.
	@[ ! -d build/image/store ] || awk -v ours="$(CURDIR)/build/image/" 'index($$2, ours) == 1 { print $$2 }' /proc/mounts | sort -r | xargs -r umount
	rm -rf artifacts build .mypy_cache .pytest_cache .ruff_cache
