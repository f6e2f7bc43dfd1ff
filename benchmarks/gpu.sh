#!/usr/bin/env bash
# `make gpu`: the gpu-marked tests, then benchmarks/gpu.py, in under 9 minutes on a machine with one GPU.
# Records and logs go to $OUT (default: gpu-results). --tiny tries the whole script out on a CPU; its figures mean nothing.
# Other words are a command to run in place of tests and benchmarks, such as: benchmarks/gpu.sh python3 -m officina.benchmarks.tune all
#
# It needs a Python with torch for this GPU, not an installation: .venv if it is there, else python3 (or PYTHON=...).
# Packages that this Python lacks are taken from wheels in .whl/, for nodes without network. To fill it elsewhere, for
# Python 3.12 on x86-64:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d .whl \
#       hydra-core 'omegaconf<2.4' pydantic pydantic-core annotated-types typing-inspection xxhash
#   pip wheel --no-deps -w .whl antlr4-python3-runtime==4.9.3
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
began=$SECONDS
total_s=${TOTAL_S:-530}
out=${OUT:-$root/gpu-results}
mkdir -p "$out"
tiny=() ; [[ ${1:-} == --tiny ]] && tiny=(--tiny)

python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi

scratch=$(mktemp -d) ; trap 'rm -rf "$scratch"' EXIT
# The folders as officina.*, without an installation.
mkdir -p "$scratch/links/officina"
for folder in trainer kernels configs launch benchmarks; do ln -s "$root/$folder" "$scratch/links/officina/$folder"; done
export PYTHONPATH=$scratch/links${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8  # what bitwise tests need; it has to be set before CUDA starts
unset OFFICINA_GPU_TESTS_ON
if compgen -G ".whl/*.whl" > /dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/wheels" .whl/*.whl
    export PYTHONPATH=$PYTHONPATH:$scratch/wheels
fi
"$python" - <<'PY'
import importlib.util, sys
names = "torch numpy pytest hydra omegaconf pydantic yaml xxhash tokenizers psutil rich".split()
missing = [name for name in names if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"officina: {sys.executable} has no {', '.join(missing)}. Install them, or put their wheels into .whl/ "
             "(the head of benchmarks/gpu.sh says how)")
PY
if [[ ${#tiny[@]} -eq 0 ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "officina: torch of $python sees no GPU. Give another one: make gpu PYTHON=...; or try it out: benchmarks/gpu.sh --tiny" >&2
    exit 2
fi

if [[ ${#tiny[@]} -eq 0 && $# -gt 0 ]]; then
    "$@" ; exit
fi

status=0
[[ ${#tiny[@]} -gt 0 ]] && export OFFICINA_GPU_TESTS_ON=cpu
at_once=${TESTS_AT_ONCE:-$(nproc)}  # asked before the next line, which nproc obeys
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1  # compiling takes most of the time: many tests at once, a thread each
tests=("$python" -m pytest -m gpu -v --tb short -p no:cacheprovider --durations 10)
# One that hangs is named and its process ended, and the others go on.
"$python" -c "import xdist" 2> /dev/null &&
    tests+=(--numprocesses "$at_once" -o faulthandler_timeout=120 -o faulthandler_exit_on_timeout=true)
hopper=(tests/gpu/test_flash_attention_hopper*.py)
timeout -k 5 "${TESTS_S:-200}" "${tests[@]}" tests/gpu "${hopper[@]/#/--ignore=}" 2>&1 | tee "$out/tests.log" || status=1
# By themselves: their warps wait for each other, so a fault may be a program without end.
timeout -k 5 "${HOPPER_TESTS_S:-100}" "${tests[@]}" "${hopper[@]}" 2>&1 | tee "$out/tests_hopper.log" || status=1
unset OFFICINA_GPU_TESTS_ON OMP_NUM_THREADS TORCHINDUCTOR_COMPILE_THREADS CUBLAS_WORKSPACE_CONFIG
left_s=$((total_s - (SECONDS - began)))
timeout "$((left_s + 5))" "$python" -m officina.benchmarks.gpu --out "$out" --seconds "$((left_s - 15))" "${tiny[@]}" 2>&1 |
    tee "$out/benchmarks.log" || status=1
echo "gpu: $((SECONDS - began)) s, records in $out, status $status"
exit $status
