# syntax=docker/dockerfile:1
# lodeset without GPUs: the head and the workers of a Ray cluster, or a run on one machine.
#
#   docker build -f docker/cpu.Dockerfile -t lodeset:cpu --build-arg REVISION="$(git rev-parse HEAD)" .
#
# A tag can move. For images that can be built again, give the base by its digest:
# --build-arg BASE=python:3.11-slim-bookworm@sha256:...
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY requirements.lock pyproject.toml docker/dependencies.py docker/pinned.py ./
# torch comes first and alone: the build on PyPI would bring CUDA.
RUN python -m pip install --constraint requirements.lock --index-url "${TORCH_INDEX}" --no-deps torch
RUN python dependencies.py cpu hf onnx formats s3 > requirements.txt \
    && python -m pip install --constraint requirements.lock --requirement requirements.txt setuptools
COPY LICENSE README.md ./
COPY infra/ infra/
COPY pipeline/ pipeline/
COPY pruning/ pruning/
COPY training/ training/
COPY lodeset/ lodeset/
RUN python -m pip install --no-deps --no-build-isolation . \
    && python pinned.py requirements.lock lodeset pip wheel

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
# Some releases of KubeRay probe their pods with wget. Debian keeps only the newest version of a package.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/*
# On every PATH, that of a login shell too: KubeRay starts Ray through one.
COPY --from=build /usr/local /usr/local
RUN groupadd --gid 10001 lodeset \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /home/lodeset --shell /usr/sbin/nologin lodeset \
    && install --directory --owner 10001 --group 10001 --mode 0700 /home/lodeset /data/store \
    && lodeset --version \
    && python -c "import apache_beam, cv2, faiss, onnxruntime, pyarrow, ray, torch; assert not torch.version.cuda"
ENV HOME=/home/lodeset PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
WORKDIR /home/lodeset
# What a run writes: /tmp, /home/lodeset and the store. Everything else may be mounted read-only.
USER 10001:10001
ENTRYPOINT ["lodeset"]
CMD ["--help"]
