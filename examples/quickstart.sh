#!/usr/bin/env bash
# From nothing to a learning curve: environment, tiny model, cold start, RL. What is already there is skipped; a run that was
# interrupted goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
data=runs/quickstart-data

bash tools/setup.sh
source .venv/bin/activate
export OMP_NUM_THREADS=1

if [ ! -f $data/model/config.json ]; then
  echo "== tiny Qwen3-MoE checkpoint and tokenizer: $data/model"
  python tools/tiny_model.py --out $data/model.partial >/dev/null
  mv $data/model.partial $data/model
fi
if [ ! -f $data/demos.jsonl ]; then
  echo "== prompts and noisy demonstrations: $data/*.jsonl"
  python tools/digit_sum.py --out $data >/dev/null
fi
if [ ! -f $data/cold/config.json ]; then
  echo "== cold start: megarl sft examples/cold_start.yaml"
  megarl sft examples/cold_start.yaml
fi
echo "== RL: megarl run examples/quickstart.yaml"
megarl run examples/quickstart.yaml
megarl report runs/quickstart
