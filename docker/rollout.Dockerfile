# The rollout image: SGLang's own, and trd beside it, which starts, watches and labels the servers.
#   docker build -f docker/rollout.Dockerfile -t trd-rollout:0.1.0 .
# Servers run in the base's Python: give trd engine.python=/usr/local/bin/python-sglang.
# Pins: docker/versions.txt.
ARG SGLANG_IMAGE=lmsysorg/sglang:v0.5.23
FROM ${SGLANG_IMAGE}
ARG SGLANG_IMAGE
ARG SGLANG_VERSION=0.5.23
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Not a link: a Python looks beside its own name for what belongs to it.
RUN printf '#!/bin/sh\nexec %s "$@"\n' "$(command -v python3)" > /usr/local/bin/python-sglang \
    && chmod 755 /usr/local/bin/python-sglang
WORKDIR /opt/src
COPY requirements.lock requirements-models.lock docker/test_only.txt ./
# SGLang pins another transformers. Ours lies in an environment that takes torch alone from the base.
# --no-deps: the lock file is complete, and nothing may replace the base's torch and triton.
RUN python3 -m venv --without-pip --system-site-packages /opt/trd \
    && grep -v -E -f test_only.txt -e '^torch==' requirements.lock > runtime.lock \
    && python3 -m pip --python /opt/trd/bin/python install --no-deps --ignore-installed -r runtime.lock -r requirements-models.lock
COPY setup.py pyproject.toml README.md LICENSE ./
COPY conf conf
COPY trd_megatron trd_megatron
RUN python3 -m pip --python /opt/trd/bin/python install --no-deps --no-build-isolation .
# The base may have a user of this number already.
RUN (getent passwd 1000 || useradd --no-create-home --uid 1000 trd) \
    && install --directory --owner=1000 --group=1000 /home/trd /runs /cache
ENV PATH=/opt/trd/bin:${PATH} HOME=/home/trd HF_HOME=/cache/hub TRD_CACHE=/cache/trd
ARG TRD_VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="trd-rollout" \
      org.opencontainers.image.description="trd_megatron: SGLang servers and the stages that generate" \
      org.opencontainers.image.version="${TRD_VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${SGLANG_IMAGE}"
USER 1000:1000
# As the user who will serve: the base's packages must be readable for others than root.
RUN python-sglang -c "from importlib.metadata import version; v = version('sglang'); assert v == '${SGLANG_VERSION}', v"
# So that the default run_dir, runs/NAME, is in the volume /runs.
WORKDIR /
EXPOSE 30000
# Needs no key. Loading a model takes minutes.
HEALTHCHECK --interval=15s --timeout=10s --start-period=30m --retries=4 \
    CMD ["curl", "--fail", "--silent", "--show-error", "--output", "/dev/null", "http://127.0.0.1:30000/health"]
CMD ["trd", "doctor"]
