#!/usr/bin/env bash
# Everything CI checks: lint, types, the configuration reference, all tests. Arguments go to pytest, whose closing line is the last one printed.
set -euo pipefail
cd "$(dirname "$0")/.."

bash tools/setup.sh
export OMP_NUM_THREADS=1
bin=.venv/bin
echo "lint:  $($bin/ruff check . && $bin/ruff format --check . | tail -n 1)"
echo "types: $($bin/mypy | tail -n 1)"
$bin/python -m megarl.config_docs --check
exec $bin/python -m pytest "$@"
