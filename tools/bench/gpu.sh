#!/usr/bin/env bash
# Every number of docs/gpu.md on one GPU, JSON into runs/gpu or --out DIR: bash tools/bench/gpu.sh [--out DIR] [--budget S] [--parts a,b] [--cpu-smoke]
# Needs torch, megatron-core, pydantic, PyYAML, xxhash and psutil; uses Transformer Engine, Apex and vLLM where they are installed, and its rows say so.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" PYTHONWARNINGS=ignore
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:False}"
exec "${PYTHON:-python3}" -m tools.bench.gpu.run "$@"
