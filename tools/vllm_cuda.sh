#!/usr/bin/env bash
# What megarl touches of vLLM, looked for in its CUDA build, without a GPU or driver: tests/vllm_cuda.
#
#   PYTHON=/path/to/python bash tools/vllm_cuda.sh FOLDER [RELEASE]
#
# PYTHON: of an environment with megarl and a CUDA build of torch. vLLM's wheel (0.3 GB) is unpacked in FOLDER, before
# whatever vLLM that environment has. libcuda.so.1 comes with a driver; in its place stands a library whose every
# function answers that there is no device.
set -euo pipefail

folder=${1:?give a folder for the wheel} release=${2:-0.32.0} python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
wheel=$folder/vllm-$release
if [ ! -d "$wheel" ]; then
    "$python" -m pip download --quiet --no-deps --only-binary :all: --dest "$folder" "vllm==$release"
    "$python" -m zipfile --extract "$folder/vllm-$release"-*.whl "$wheel"
fi
mkdir -p "$wheel/driver"
find "$wheel" -name '*.so' -exec nm --dynamic --undefined-only {} + | sed -n 's/^ *U \(cu[A-Z][A-Za-z0-9_]*\).*/\1/p' | sort --unique |
    sed 's/.*/int &(void) { return 100; }/' |
    cc -shared -fPIC -x c - -o "$wheel/driver/libcuda.so.1" -Wl,-soname,libcuda.so.1
export PYTHONPATH=$wheel:$here LD_LIBRARY_PATH=$wheel/driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} OMP_NUM_THREADS=1
export VLLM_NO_USAGE_STATS=1
cd "$here"
exec "$python" -m pytest -q -p no:cacheprovider -rs tests/vllm_cuda
