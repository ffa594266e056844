#!/usr/bin/env bash
# What one node of a job does. From the environment: CONFIG; OVERRIDES (key=value ..., launch.store among them); TRAINERS, the number of
# nodes that train; HEAD, the host of rank 0; this node's number as SLURM_NODEID or JOB_COMPLETION_INDEX (a Kubernetes indexed job);
# ROLLOUT_PYTHON, the Python that holds vLLM, where it is not the trainers'.
set -euo pipefail
node=${SLURM_NODEID:-${JOB_COMPLETION_INDEX:?neither SLURM_NODEID nor JOB_COMPLETION_INDEX is set}}
gpus=${GPUS_PER_NODE:-8}
read -r -a overrides <<<"$OVERRIDES"

# python -m torch.distributed.run: a torchrun of an outer environment would start that one's Python
if [ "$node" -lt "$TRAINERS" ]; then
    exec python -m torch.distributed.run --nnodes "$TRAINERS" --node-rank "$node" --nproc-per-node "$gpus" --master-addr "$HEAD" --master-port 29500 \
        -m megarl.train "$CONFIG" "${overrides[@]}"
fi

read -r engines tp < <(python -c 'import sys; from megarl.config import load_config
rollout = load_config(sys.argv[1], sys.argv[2:]).rollout
print(rollout.engines, rollout.tp)' "$CONFIG" "${overrides[@]}")
first=$(((node - TRAINERS) * (gpus / tp)))
pids=()
for ((i = 0; i < gpus / tp && first + i < engines; i++)); do
    CUDA_VISIBLE_DEVICES=$(seq -s, $((i * tp)) $(((i + 1) * tp - 1))) "${ROLLOUT_PYTHON:-python}" -m megarl rollout "$CONFIG" "${overrides[@]}" &
    pids+=($!)
done
# Servers end quietly when the trainers tell them to; one that fails takes the node, and so the job, with it.
for _ in "${pids[@]}"; do
    wait -n || { status=$?; kill "${pids[@]}" 2>/dev/null || true; exit "$status"; }
done
