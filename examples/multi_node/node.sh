#!/usr/bin/env bash
# What one node of a job does. From the environment: CONFIG; OVERRIDES (key=value ..., launch.store among them); TRAINERS, the number of
# nodes that train; HEAD, the host of rank 0; this node's number as SLURM_NODEID or JOB_COMPLETION_INDEX (a Kubernetes indexed job);
# ROLLOUT_PYTHON, the Python that holds vLLM, where it is not the trainers'; RESTARTS (3), how often a rollout worker that was killed
# or crashed is started again; TRAINER_RESTARTS (3), how often in the whole job torchrun starts the trainers again, the same on all nodes.
set -euo pipefail
node=${SLURM_NODEID:-${JOB_COMPLETION_INDEX:?neither SLURM_NODEID nor JOB_COMPLETION_INDEX is set}}
gpus=${GPUS_PER_NODE:-8} restarts=${RESTARTS:-3}
read -r -a overrides <<<"$OVERRIDES"

# python -m torch.distributed.run: a torchrun of an outer environment would start that one's Python
if [ "$node" -lt "$TRAINERS" ]; then
    exec python -m torch.distributed.run --nnodes "$TRAINERS" --node-rank "$node" --nproc-per-node "$gpus" --master-addr "$HEAD" --master-port 29500 \
        --max-restarts "${TRAINER_RESTARTS:-3}" -m megarl.train "$CONFIG" "${overrides[@]}"
fi

read -r engines tp < <(python -c 'import sys; from megarl.config import load_config
rollout = load_config(sys.argv[1], sys.argv[2:]).rollout
print(rollout.engines, rollout.tp)' "$CONFIG" "${overrides[@]}")
first=$(((node - TRAINERS) * (gpus / tp)))

# ended PID: its exit status, once it has ended. SIGTERM, whose trap sets `stopped`, cuts a wait short.
ended() {
    local status cut
    while cut=$stopped status=0; wait "$1" || status=$?; [ "$cut" != "$stopped" ]; do :; done
    return "$status"
}

# serve GPUS: a rollout worker. It ends well when the trainers tell it to, or after SIGTERM; status 2 is for a person to mend.
serve() {
    local try child= status stopped=
    trap 'stopped+=1; kill "$child" 2>/dev/null || true' TERM
    for ((try = 0; ; try++)); do
        CUDA_VISIBLE_DEVICES=$1 "${ROLLOUT_PYTHON:-python}" -m megarl rollout "$CONFIG" "${overrides[@]}" &
        child=$! status=0
        [ -z "$stopped" ] || kill "$child"  # a signal that came before it was there
        ended "$child" || status=$?
        [ -z "$stopped" ] && [ "$status" != 0 ] && [ "$status" != 2 ] && [ "$try" -lt "$restarts" ] || return "$status"
        echo "node.sh: the rollout worker on GPUs $1 ended with status $status; restart $((try + 1)) of $restarts" >&2
        sleep $((1 << try))
        [ -z "$stopped" ] || return 0
    done
}

pids=() stopped=
trap 'stopped+=1; kill "${pids[@]}" 2>/dev/null || true' TERM
for ((i = 0; i < gpus / tp && first + i < engines; i++)); do
    serve "$(seq -s, $((i * tp)) $(((i + 1) * tp - 1)))" &
    pids+=($!)
done
# The run goes on without a worker that has given up, so that is no failure of the job; what a person must mend is.
mistake=0
for pid in "${pids[@]}"; do
    ended "$pid" || [ "$?" != 2 ] || mistake=2
done
exit "$mistake"
