# The learner image: trd on NVIDIA's PyTorch, which brings torch, CUDA, NCCL, Transformer Engine and Apex.
#   docker build -f docker/learner.Dockerfile -t trd-learner:0.1.0 .
# Pins: docker/versions.txt.
ARG PYTORCH_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${PYTORCH_IMAGE}
ARG PYTORCH_IMAGE
ARG TORCH_VERSION=2.13.0
ARG MEGATRON_CORE_VERSION=0.16.1
# The base constrains packages to its own versions. Ours lie beside them, in an environment that sees the base's.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=""
WORKDIR /opt/src
COPY requirements.lock requirements-models.lock docker/test_only.txt ./
# --no-deps: the lock file is complete, and nothing may replace the base's torch and triton.
RUN python3 -m venv --without-pip --system-site-packages /opt/trd \
    && grep -v -E -f test_only.txt -e '^torch==' requirements.lock > runtime.lock \
    && python3 -m pip --python /opt/trd/bin/python install --no-deps --ignore-installed -r runtime.lock -r requirements-models.lock
COPY setup.py pyproject.toml README.md LICENSE ./
COPY conf conf
COPY trd_megatron trd_megatron
RUN python3 -m pip --python /opt/trd/bin/python install --no-deps --no-build-isolation .
ENV PATH=/opt/trd/bin:${PATH}
COPY docker/check_learner.py ./
RUN python check_learner.py "${TORCH_VERSION}" "${MEGATRON_CORE_VERSION}"
# The base may have a user of this number already.
RUN (getent passwd 1000 || useradd --no-create-home --uid 1000 trd) \
    && install --directory --owner=1000 --group=1000 /home/trd /runs /cache
ENV HOME=/home/trd HF_HOME=/cache/hub TRD_CACHE=/cache/trd
ARG TRD_VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="trd-learner" \
      org.opencontainers.image.description="trd_megatron: Megatron learner on NVIDIA GPUs" \
      org.opencontainers.image.version="${TRD_VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${PYTORCH_IMAGE}"
USER 1000:1000
# So that the default run_dir, runs/NAME, is in the volume /runs.
WORKDIR /
# What a learner that hangs does not say itself: a GPU that fell off the bus, a run directory that cannot be written.
HEALTHCHECK --interval=60s --timeout=30s --start-period=60s --retries=3 \
    CMD ["sh", "-c", "nvidia-smi --list-gpus && test -w /runs"]
CMD ["trd", "doctor"]
