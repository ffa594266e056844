#!/usr/bin/env bash
# Transformer Engine's real layers, built without a GPU or driver: names, shapes and sharding of every family's model.
#
#   PYTHON=/path/to/python bash tools/te_record.sh FOLDER [RELEASE]
#
# PYTHON: of an environment with megarl, a CUDA build of torch and its headers. Transformer Engine's torch extension is
# compiled in FOLDER (28 files, half an hour of a core), its core is PyPI's. Writes tests/unit/te_record.json, which
# tests/unit/te_stub.py is held to.
set -euo pipefail

folder=${1:?give a folder for the build} release=${2:-2.11.0} python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
packages=$folder/packages
pip() { "$python" -m pip --quiet --disable-pip-version-check "$@"; }
if [ ! -d "$packages" ]; then
    pip install --no-deps --target "$packages" "transformer_engine==$release" "transformer_engine_cu13==$release" \
        einops onnx onnx_ir onnxscript ml_dtypes 'nvidia-cuda-cccl==13.0.*' 'nvidia-cuda-crt==13.0.*'
fi
source=$folder/transformer_engine_torch-$release
if [ ! -d "$source" ]; then
    pip download --no-deps --no-build-isolation --no-binary transformer_engine_torch --dest "$folder" "transformer_engine_torch==$release"
    tar --extract --gzip --file "$source.tar.gz" --directory "$folder"
    sed -i 's/"-O3"/"-O0"/' "$source/build_tools/pytorch.py"  # nothing is computed with it
fi
toolkit=$("$python" -c 'import nvidia; print(list(nvidia.__path__)[0])')
# what the build asks of a toolkit: headers, and a compiler that tells its release
mkdir -p "$folder/toolkit/bin"
printf '#!/bin/sh\necho "release 13.0"\n' >"$folder/toolkit/bin/nvcc"
chmod +x "$folder/toolkit/bin/nvcc"
ln -sfn "$toolkit/cu13/include" "$folder/toolkit/include"
ln -sfn "$toolkit/cu13/lib" "$folder/toolkit/lib64"
export CUDA_HOME=$folder/toolkit NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS=${MAX_JOBS:-1}
ours=$packages/nvidia/cu13/include
CPLUS_INCLUDE_PATH=$toolkit/cu13/include:$toolkit/cudnn/include:$toolkit/nccl/include:$ours:$ours/cccl
export CPLUS_INCLUDE_PATH
(cd "$source" && "$python" setup.py --quiet build_ext --inplace && cp transformer_engine_torch*.so "$packages")
export LD_LIBRARY_PATH=$toolkit/cu13/lib:$toolkit/cudnn/lib:$toolkit/nccl/lib
export PYTHONPATH=$packages:$here OMP_NUM_THREADS=1
cd "$here"
exec "$python" -W ignore tools/te_record.py --out tests/unit/te_record.json
