#!/bin/sh
# Everything about the kernels that needs an NVIDIA GPU, with torch, triton and pytest alone:
#   sh benchmarks/gpu.sh check           correctness, repetition, CUDA graphs, memory checker
#   sh benchmarks/gpu.sh time [OPTIONS]  benchmarks.kernels, appended to benchmarks/results/kernels.jsonl
#   sh benchmarks/gpu.sh tune [OPTIONS]  benchmarks.tune
set -eu
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH=.
task=$1
shift
case $task in
check)
    # pytest-xdist, where present, compiles for several tests at a time.
    workers=$("$PYTHON" -c 'import importlib.util as u; print("-n 8" if u.find_spec("xdist") else "")')
    "$PYTHON" -m pytest -q $workers -m gpu tests/kernels
    if command -v compute-sanitizer > /dev/null; then
        compute-sanitizer --error-exitcode 1 "$PYTHON" -m pytest -q -m gpu tests/kernels \
            -k "gpu_matches and bfloat16 and (63-tokens or 100-tokens-all-widths or 130-tokens-foreign or 300-tokens-group-64 or group-64)"
    fi
    ;;
time) "$PYTHON" -m benchmarks.kernels "$@" ;;
tune) "$PYTHON" -m benchmarks.tune "$@" ;;
*)
    echo "usage: sh benchmarks/gpu.sh check|time|tune [OPTIONS]" >&2
    exit 2
    ;;
esac
