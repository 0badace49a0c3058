# Two images: `service` answers requests and holds no torch; `proof` measures services and judges the evidence.
#
#   docker build --target service -t drbert-serve .                               for CPUs, with the example models of artifacts/ baked in
#   docker build --target service -t drbert-serve:0.1.0-gpu --build-arg EXTRAS=gpu .    CUDA comes with pip's wheels; the host only needs a driver
#   docker build --target service -t drbert-serve:0.1.0-traced --build-arg EXTRAS=tracing .    for settings.tracing; both: EXTRAS=gpu,tracing
#   docker build --target service -t reviews --build-arg MODELS=models .          models/NAME baked in at /models/NAME
#   docker build --target proof -t drbert-proof .
#
# Without MODELS the example models must exist: `make artifacts/bert/manifest.json artifacts/drbert/manifest.json`.
# `make image` exports them and builds both images without a container engine.

# `make pin-base` adds today's digest of the tag.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS python
# No pinned versions: Debian's newest patch releases are wanted.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
# The chart's runAsUser, runAsGroup and fsGroup by default. All files are world-readable, for clusters that choose another user.
RUN groupadd --gid 10001 drbert && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin drbert
# Nothing is written next to the code: the root may be read-only, with /tmp as the only writable folder.
ENV PATH=/app/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1


FROM python AS requirements
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
# pip has an environment of its own and is not part of the images.
RUN python3 -m venv /pip && python3 -m venv --without-pip /app
WORKDIR /build
COPY k8s/requirements.py pyproject.toml constraints.txt install.sh ./
# Every package is checked against the hashes of constraints.txt. pip comes first, because Debian's release ignores hashes in constraints.
RUN sed -n '/^pip==/,/[^\\]$/p' constraints.txt > pip.txt \
    && sh install.sh /pip/bin/python --no-cache-dir --require-hashes --requirement pip.txt \
    && sh install.sh /pip/bin/python --no-cache-dir --constraint constraints.txt setuptools
ARG EXTRAS=""
# OpenVINO is installed without its telemetry, which reports to an outside host. Its plugins for graphics and neural processors and its
# headers are removed, because it only computes on CPUs here.
# OpenVINO's wheel for arm64 lacks some of the files that are removed.
RUN python3 requirements.py "${EXTRAS}" > requirements.txt \
    && PIP_PYTHON=/app/bin/python sh install.sh /pip/bin/python --no-cache-dir --constraint constraints.txt --requirement requirements.txt \
    && /pip/bin/pip --python /app/bin/python uninstall --yes openvino-telemetry \
    && rm -rf /app/lib/python3*/site-packages/openvino/include /app/lib/python3*/site-packages/openvino/libs/cache.json \
        /app/lib/python3*/site-packages/openvino/libs/libopenvino_intel_[gn]pu_plugin.so


FROM requirements AS code
COPY . .
RUN /pip/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /pip/bin/pip --python /app/bin/python install --no-cache-dir --no-deps --no-index --prefix /code /wheels/*.whl


FROM python AS models
ARG MODELS=artifacts
COPY ${MODELS} /models
RUN chmod -R a+rX /models


# Layers that change rarely come first.
FROM python AS service
COPY --from=requirements /app /app
COPY --from=models /models /models
COPY --from=code /code /app
USER 10001:10001
EXPOSE 8000
ENTRYPOINT ["python", "-m", "service"]
CMD ["bert=/models/bert", "drbert=/models/drbert", "--host", "0.0.0.0", "--port", "8000"]
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="drbert-serve" \
      org.opencontainers.image.description="Serves BERT classifiers over HTTP" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"


FROM requirements AS proof-requirements
# OpenVINO requires its telemetry, so pip installs it again.
RUN python3 requirements.py proof,loadtests > requirements.txt \
    && PIP_PYTHON=/app/bin/python sh install.sh /pip/bin/python --no-cache-dir --constraint constraints.txt --requirement requirements.txt \
    && /pip/bin/pip --python /app/bin/python uninstall --yes openvino-telemetry


FROM code AS proof-code
# The load generator looks for the example texts next to its own package.
RUN mv examples /code/lib/python3*/site-packages/


FROM python AS proof
COPY --from=proof-requirements /app /app
COPY --from=proof-code /code /app
# Plans name the example texts by this path.
COPY examples/texts /proof/examples/texts
WORKDIR /proof
USER 10001:10001
ENTRYPOINT ["python", "-m", "proof"]
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="drbert-proof" \
      org.opencontainers.image.description="Measures whether a model swap adds latency, and judges the evidence" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
