# Not yet built (docs/gpu.md). Linted by hadolint in CI.
#
# Two environments, because a vLLM wheel fits one released torch only and NGC's torch is a build of its own:
#   /opt/train    NGC's torch, Transformer Engine and Apex; megatron-core and megarl: the trainer ranks, and the `megarl` command
#   /opt/rollout  vLLM with the torch it was built for; megarl: the rollout servers (launch.rollout_python)
# Weights travel between them by NCCL, which takes one release at both ends: NGC's.
FROM nvcr.io/nvidia/pytorch:26.03-py3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# PIP_CONSTRAINT: NGC pins what its own Python holds; the environments below have pins of their own.
ENV PIP_CONSTRAINT="" PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv --system-site-packages /opt/train \
    && /opt/train/bin/pip install --no-cache-dir megatron-core==0.19.2 nvidia-dali-cuda130==2.4.0 \
    && python3 -m venv /opt/rollout \
    && /opt/rollout/bin/pip install --no-cache-dir torch==2.13.0 vllm==0.32.0

WORKDIR /opt/megarl
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megarl megarl
COPY examples examples
COPY tools tools
COPY checkpoints_conversion checkpoints_conversion
RUN /opt/train/bin/pip install --no-cache-dir . \
    && /opt/rollout/bin/pip install --no-cache-dir . \
    && nccl="$(/opt/train/bin/python -c 'from megarl.weights.transport.nccl import nccl_version; print(nccl_version())')" \
    && /opt/rollout/bin/pip install --no-cache-dir --no-deps "nvidia-nccl-cu13==$nccl" \
    && /opt/rollout/bin/python -c "from megarl.weights.transport.nccl import nccl_version as v; assert v() == '$nccl', v()" \
    && /opt/train/bin/python -c "import torch, transformer_engine.pytorch, apex, megarl" \
    && useradd --create-home --uid 10001 megarl \
    && mkdir /work && chown megarl /work

# ROLLOUT_PYTHON: for examples/multi_node/node.sh and megarl doctor. MEGARL_NEEDS_GPU: no driver is an error, not a CPU.
ENV PATH=/opt/train/bin:$PATH ROLLOUT_PYTHON=/opt/rollout/bin/python MEGARL_NEEDS_GPU=1
USER 10001
WORKDIR /work
HEALTHCHECK --interval=60s --timeout=20s --start-period=120s --retries=3 CMD ["bash", "-c", "megarl --version && nvidia-smi -L"]
CMD ["megarl", "doctor"]
