#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under eight minutes: build, tests, sanitizer, benchmarks, table.
#
#   benchmarks/gpu.sh
#   PYTHON=python3.12 WHEELS=wheels benchmarks/gpu.sh
#
# Works offline where torch (a CUDA build), nvcc, ninja and pybind11 are installed; WHEELS is a folder of
# wheels for what else is missing (megatron-core, pydantic, hypothesis, pytest, rich, ...), put on
# PYTHONPATH and installed nowhere. Results and logs go to $OUT, or to benchmarks/results.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export OUT=${OUT:-$PWD/benchmarks/results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$OUT"
failed=()

step() { # name, seconds, command...: its log in $OUT, its end here; goes on when it fails
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1 || failed+=("$name")
  tail -n "${TAIL:-6}" "$OUT/$name.log"
  echo "== $name took $((SECONDS - start)) s"
}

if [[ -n ${WHEELS:-} ]]; then
  site=$(mktemp -d)
  step wheels 60 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
  export PYTHONPATH=$PYTHONPATH:$site
fi
# The machine code of this card only, all files at once.
TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
export TORCH_CUDA_ARCH_LIST
PEAR_MEGATRON_CUDA=1 step build 240 "$PYTHON" setup.py build_ext --inplace
step tests 200 "$PYTHON" -m pytest tests/gpu -q -x --maxfail=20
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do
    step "$tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -m tests.gpu.small_cases
  done
else
  echo "== compute-sanitizer is not installed: not run"
fi
TAIL=400 step logprob 150 "$PYTHON" benchmarks/logprob.py --device cuda --seconds "${SECONDS_PER_NUMBER:-0.05}" --tokens 8192
TAIL=20 step step 90 "$PYTHON" benchmarks/step.py --device cuda --seconds 1
echo "== ${SECONDS} s in all; failed: ${failed[*]:-nothing}"
[[ ${#failed[@]} -eq 0 ]]
