# syntax=docker/dockerfile:1
# treepo_mcore on NVIDIA GPUs: docs/launching.md, section Containers.
#
#   docker build --tag treepo_mcore .
#
# How torch, vLLM, Transformer Engine and apex come together:
# - torch 2.11.0 from the package index, because vLLM 0.26.0 is built against exactly that release. So the base is NGC's
#   CUDA image (compilers, NCCL's network plug-ins, InfiniBand user space), not its PyTorch image: that one brings a
#   pre-release 2.11.0a0 or 2.12, which vLLM's wheel would replace, and its own Transformer Engine and apex with it.
#   NeMo-RL and verl do the same.
# - Transformer Engine 2.16.1: the core library is a wheel, the torch extension is compiled here against that torch (C++
#   only, no kernels). The core needs cuBLAS 13.2, torch pins 13.1: requirements/gpu-overrides.txt takes 13.2.
# - apex is left out. Transformer Engine has the fused Adam, the multi-tensor norms and the layer norms that Megatron-Core
#   would take from it. Only `gradient_accumulation_fusion` of the language-model head has no other implementation; it is
#   off by default and stays off. (The package index's `apex` is another project.)
ARG BASE=nvcr.io/nvidia/cuda-dl-base:26.05-cuda13.2-devel-ubuntu24.04

# --- Python and the locked packages ---
FROM ${BASE} AS packages
SHELL ["/bin/bash", "-o", "errexit", "-o", "pipefail", "-c"]
# Ubuntu removes superseded versions from its archive, so none is pinned.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends python3 python3-dev python3-venv && \
    rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/treepo/bin:${PATH} PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/treepo
COPY requirements/gpu.lock /tmp/
# The lock was resolved as a whole: no dependency is looked up again, every file is checked by its hash.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --require-hashes --only-binary :all: --requirement /tmp/gpu.lock

# --- Transformer Engine's torch extension ---
FROM packages AS transformer-engine
COPY requirements/gpu-source.lock /tmp/
ENV NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_WITH_NCCL_EP=0
# Headers of the mathematical libraries are in the wheels that torch brought, crt/host_defines.h is in the toolkit.
RUN site=$(python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])') && \
    nvidia=$site/nvidia && \
    export CPATH="$nvidia/cu13/include:$nvidia/cudnn/include:$nvidia/nccl/include:/usr/local/cuda/include" && \
    pip wheel --no-deps --no-build-isolation --require-hashes --wheel-dir /wheels --requirement /tmp/gpu-source.lock

# --- The image: each layer changes more often than the one before, the last is a few hundred kilobytes ---
FROM packages AS treepo
# The cuDNN that torch was built with, before the base image's.
ENV CUDNN_PATH=/opt/treepo/lib/python3.12/site-packages/nvidia/cudnn
ENV LD_LIBRARY_PATH=${CUDNN_PATH}/lib:${LD_LIBRARY_PATH}
RUN --mount=type=bind,from=transformer-engine,source=/wheels,target=/wheels \
    pip install --no-deps --no-cache-dir /wheels/*.whl
# Fails the build, not the first job, when these do not load together.
# `import vllm` alone loads next to nothing: its names are looked up when they are asked for.
RUN python -c 'import torch, transformer_engine.pytorch; from megatron.core.models.gpt import GPTModel; from vllm import LLM'
RUN useradd --uid 10001 --create-home --shell /bin/bash treepo && \
    install --directory --owner treepo --group treepo /workspace
WORKDIR /opt/treepo_mcore
COPY LICENSE README.md pyproject.toml setup.py ./
COPY treepo_mcore treepo_mcore
COPY tools tools
COPY examples examples
RUN pip install --no-deps --no-build-isolation --no-cache-dir . && \
    ln -s /opt/treepo_mcore/examples /workspace/examples
LABEL org.opencontainers.image.title="treepo_mcore" \
      org.opencontainers.image.description="Tree-structured RL (TreePO) with Megatron-Core actors and a colocated vLLM" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.base.name="nvcr.io/nvidia/cuda-dl-base:26.05-cuda13.2-devel-ubuntu24.04"
USER 10001
WORKDIR /workspace
HEALTHCHECK --interval=10m --timeout=2m --start-period=1m --retries=2 CMD ["treepo-mcore", "doctor"]
CMD ["treepo-mcore", "--help"]
