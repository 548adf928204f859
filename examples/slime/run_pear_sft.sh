#!/usr/bin/env bash
# PEAR on Qwen3-4B in slime's loop, on one node of 8 GPUs. Run it inside slime's container; see README.md beside it.
set -euo pipefail

: "${SLIME_DIR:?the checkout of slime}"
: "${MEGATRON_DIR:=/root/Megatron-LM}"
: "${MODEL:?the Hugging Face folder of Qwen3-4B}"
: "${START:?its torch_dist checkpoint, made by tools/convert_hf_to_torch_dist.py of slime}"
: "${OUTPUT:?where slime keeps its checkpoints}"
: "${NUM_ROLLOUT:?steps to train: epochs x trajectories / 64}"
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

MODEL_ARGS=() # the next line fills it
# shellcheck source=/dev/null
source "$SLIME_DIR/scripts/models/qwen3-4B.sh"

PEAR_ARGS=(
    --rollout-function-path pear_megatron.adapters.slime.generate_rollout
    --rollout-data-postprocess-path pear_megatron.adapters.slime.postprocess_rollout_data
    --loss-type custom_loss
    --custom-loss-function-path pear_megatron.adapters.slime.loss_function
    --custom-config-path "${PEAR_CONFIG:-$HERE/pear.yaml}"
    --calculate-per-token-loss
    --disable-compute-advantages-and-returns
    --debug-train-only # no SGLang servers
)

CHECKPOINT_ARGS=(--hf-checkpoint "$MODEL" --ref-load "$START" --load "$OUTPUT" --save "$OUTPUT" --save-interval 100)

BATCH_ARGS=(
    --num-rollout "$NUM_ROLLOUT" --rollout-batch-size 64 --global-batch-size 64 --rollout-seed 1234
    --use-dynamic-batch-size --max-tokens-per-gpu 9216
)

PARALLEL_ARGS=(
    --tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
)

OPTIMIZER_ARGS=(
    --optimizer adam --lr 1e-5 --min-lr 1e-6 --lr-decay-style cosine --lr-warmup-fraction 0.03
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
)

OTHER_ARGS=(
    --attention-dropout 0.0 --hidden-dropout 0.0 --accumulate-allreduce-grads-in-fp32
    --attention-softmax-in-fp32 --attention-backend flash
)

cd -- "$SLIME_DIR"
ray start --head --num-gpus 8 --disable-usage-stats
trap 'ray stop' EXIT
ray job submit --address=http://127.0.0.1:8265 \
    --runtime-env-json="{\"env_vars\": {\"PYTHONPATH\": \"$MEGATRON_DIR\", \"CUDA_DEVICE_MAX_CONNECTIONS\": \"1\"}}" \
    -- python3 train_async.py --actor-num-nodes 1 --actor-num-gpus-per-node 8 \
    "${MODEL_ARGS[@]}" "${CHECKPOINT_ARGS[@]}" "${PEAR_ARGS[@]}" "${BATCH_ARGS[@]}" "${PARALLEL_ARGS[@]}" \
    "${OPTIMIZER_ARGS[@]}" "${OTHER_ARGS[@]}" "$@"
