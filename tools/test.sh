#!/usr/bin/env bash
# Everything CI checks: lint, types, the configuration reference, all tests. Arguments go to pytest, whose closing line is the last one.
set -euo pipefail
cd "$(dirname "$0")/.."

bash tools/setup.sh
export OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python tools/config_docs.py --check
exec .venv/bin/python -m pytest "$@"
