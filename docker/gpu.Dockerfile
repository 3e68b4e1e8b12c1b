# syntax=docker/dockerfile:1
# lodeset with GPUs: workers of a Ray cluster, or a run on one machine.
#
#   docker build -f docker/gpu.Dockerfile -t lodeset:gpu --build-arg REVISION="$(git rev-parse HEAD)" .
#
# The CUDA release is that of all three: torch's wheels, FAISS's wheel (faiss-gpu 1.15.1 is built for 12.6) and the base,
# which brings what lets an older driver run it. torch 2.13 has wheels for 12.6, 13.0 and 13.2; 12.6 has none for
# Blackwell. Python is copied from the image that `cpu.Dockerfile` is made of: all nodes of a Ray cluster need the same.
# Digests: as in `cpu.Dockerfile`, for PYTHON_BASE and BASE.
ARG PYTHON_BASE=python:3.11-slim-bookworm
ARG BASE=nvidia/cuda:12.6.3-base-ubuntu24.04

FROM ${PYTHON_BASE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu126
ARG FAISS=1.15.1
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY requirements.lock pyproject.toml docker/dependencies.py docker/pinned.py ./
# torch comes first and alone: it pins NVIDIA's libraries and Triton to the patch, which the next step installs.
RUN python -m pip install --constraint requirements.lock --index-url "${TORCH_INDEX}" --no-deps torch
RUN python dependencies.py gpu hf onnx formats s3 > requirements.txt \
    && python -m pip install --constraint requirements.lock --requirement requirements.txt \
       "faiss-gpu==${FAISS}" setuptools
COPY LICENSE README.md ./
COPY infra/ infra/
COPY pipeline/ pipeline/
COPY pruning/ pruning/
COPY training/ training/
COPY lodeset/ lodeset/
RUN python -m pip install --no-deps --no-build-isolation . \
    && python pinned.py requirements.lock lodeset pip wheel faiss-gpu triton 'nvidia-*' 'cuda-*'

FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG BASE
LABEL org.opencontainers.image.title="lodeset" \
      org.opencontainers.image.description="From a pile of uncurated images to a pretrained, pruned vision model" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}"
# The libraries that Python's own modules are linked with, and wget: see `cpu.Dockerfile`.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libbz2-1.0 libexpat1 libffi8 liblzma5 \
       libncursesw6 libreadline8t64 libsqlite3-0 libssl3t64 libuuid1 netbase tzdata wget zlib1g \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /usr/local /usr/local
RUN ldconfig \
    && python -c "import bz2, ctypes, curses, lzma, pyexpat, readline, sqlite3, ssl, uuid, zlib" \
    && groupadd --gid 10001 lodeset \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /home/lodeset --shell /usr/sbin/nologin lodeset \
    && install --directory --owner 10001 --group 10001 --mode 0700 /home/lodeset /data/store \
    && lodeset --version \
    && python -c "import apache_beam, cv2, onnxruntime, pyarrow, ray, torch; assert torch.version.cuda == '12.6'"
ENV HOME=/home/lodeset PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
WORKDIR /home/lodeset
USER 10001:10001
ENTRYPOINT ["lodeset"]
CMD ["--help"]
