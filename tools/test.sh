#!/usr/bin/env bash
# Everything CI checks: lint (the Dockerfile too), types, the generated references, all tests. Arguments go to pytest, whose closing line is the last one.
set -euo pipefail
cd "$(dirname "$0")/.."

unset PYTHONDONTWRITEBYTECODE  # compiled modules halve the start of each of the hundreds of processes that the tests make
bash tools/setup.sh
# The report is looked at in a real browser; without one those tests are skipped and say so.
if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update && apt-get install --yes --no-install-recommends chromium fonts-dejavu-core; } >.venv/chromium.log 2>&1 \
        || echo "tests: chromium could not be installed (.venv/chromium.log); its tests will be skipped"
fi
export OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
.venv/bin/hadolint Dockerfile
.venv/bin/mypy
.venv/bin/python tools/config_docs.py --check
.venv/bin/python tools/api_docs.py --check
.venv/bin/python tools/metrics_docs.py --check
[ $# -gt 0 ] || bash tools/test_next.sh --quick  # the other release of megatron-core
exec .venv/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder "$@"  # two cores; the longest first
