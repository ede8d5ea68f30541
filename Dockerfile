# White Tuner in a container: the page on port 7860, behind a password that is printed at the start.
#
#   docker build -t whitetuner .                                                      a CPU image, to try it
#   docker build -t whitetuner --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 --build-arg TORCH=cu130 .
#   docker run --gpus all --shm-size 8g -p 7860:7860 -v "$PWD/models:/whitetuner/models" -v "$PWD/data:/whitetuner/data" -v "$PWD/output:/whitetuner/output" whitetuner
#   docker run ... whitetuner train data/my.toml                                     any other word of whitetuner
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

ARG TORCH=cpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 WHITETUNER_VENV=/srv/whitetuner/venv

# A CUDA base brings no Python; the others have one already.
RUN if ! command -v python3 >/dev/null; then \
        apt-get update && \
        apt-get install -y --no-install-recommends python3 python3-venv && \
        rm -rf /var/lib/apt/lists/*; \
    fi

# Not root: what a run writes belongs to a user. 1000 is the first user of most machines.
RUN id -u 1000 >/dev/null 2>&1 || useradd --create-home --uid 1000 trainer
RUN mkdir -p /srv/whitetuner /whitetuner/models /whitetuner/data /whitetuner/output && chown -R 1000 /srv/whitetuner /whitetuner

USER 1000
ENV HOME=/whitetuner HF_HOME=/whitetuner/models/hub
WORKDIR /srv/whitetuner/app
COPY --chown=1000 . .
RUN python3 launch.py --torch-index "${TORCH}" setup

WORKDIR /whitetuner
VOLUME ["/whitetuner/models", "/whitetuner/data", "/whitetuner/output"]
EXPOSE 7860
ENTRYPOINT ["/srv/whitetuner/venv/bin/whitetuner"]
CMD ["gui", "--listen", "0.0.0.0", "--server", "--no-browser"]
