#!/usr/bin/env bash
# Tests with the megatron-core of requirements/py312.txt, whatever Python .venv has: the wheel alone beside it, first on the path. It asks
# for Python 3.12, but its Python code runs on 3.11 too. All of tests/unit and tests/parallel, or with --quick the files that hold
# what differs between releases. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

bash tools/setup.sh
wanted=$(grep '^megatron-core==' requirements/py312.txt)
beside=$PWD/.venv/$wanted
if [ ! -e "$beside/.whole" ]; then
    rm -rf "$beside"
    .venv/bin/python -m pip --quiet --disable-pip-version-check install --no-deps --no-compile --ignore-requires-python --only-binary=:all: \
        --target "$beside" "$wanted"
    touch "$beside/.whole"
fi
files="tests/unit tests/parallel"
if [ "${1:-}" = --quick ]; then
    shift
    files="tests/unit/test_families.py tests/unit/test_checkpoints.py tests/unit/test_replay_routers.py tests/unit/test_te_names.py
        tests/unit/test_pipeline.py tests/unit/test_permutation.py tests/unit/test_parallel.py tests/unit/test_simulate.py
        tests/unit/test_hybrid_adam.py tests/unit/test_experts.py tests/unit/test_save_memory.py tests/unit/test_colocate.py
        tests/parallel/test_expert_ranks.py"
fi
export OMP_NUM_THREADS=1 PYTHONPATH=$beside${PYTHONPATH:+:$PYTHONPATH}
echo "tests: with $wanted"
# shellcheck disable=SC2086
exec .venv/bin/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder $files "$@"
