#!/usr/bin/env bash
# PEAR on Qwen3-4B in verl's SFT trainer with its Megatron engine, on one node of 8 GPUs; see README.md beside it.
set -euo pipefail

: "${MODEL:?the Hugging Face folder of Qwen3-4B}"
: "${DATA:?scored trajectories, JSONL or Parquet}"
: "${OUTPUT:?where verl keeps its checkpoints}"

DATA_ARGS=(
    "data.train_files=$DATA" data.train_batch_size=64 data.max_length=16384
    data.use_dynamic_bsz=True data.max_token_len_per_gpu=8192 # times context_parallel_size: at least max_length
)

ENGINE_ARGS=(
    engine=megatron optim=megatron model.use_remove_padding=True
    engine.tensor_model_parallel_size=2 engine.context_parallel_size=2
    engine.override_transformer_config.recompute_granularity=full
    engine.override_transformer_config.recompute_method=uniform
    engine.override_transformer_config.recompute_num_layers=1
)

OPTIMIZER_ARGS=(
    optim.lr=1e-5 optim.min_lr=1e-6 optim.lr_decay_style=cosine optim.lr_warmup_steps_ratio=0.03
    optim.weight_decay=0.1 "optim.betas=[0.9,0.95]" optim.clip_grad=1.0
)

PEAR_ARGS=(+pear.variant=token "+pear.log_ratio_clip=[-0.08,0.3]")

TRAINER_ARGS=(
    trainer.project_name=pear "trainer.experiment_name=${OUTPUT##*/}" "trainer.default_local_dir=$OUTPUT"
    trainer.total_epochs=2 trainer.save_freq=100 "trainer.logger=[console]"
)

export CUDA_DEVICE_MAX_CONNECTIONS=1
torchrun --standalone --nproc-per-node=8 -m pear_megatron.adapters.verl "model.path=$MODEL" \
    "${DATA_ARGS[@]}" "${ENGINE_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${PEAR_ARGS[@]}" "${TRAINER_ARGS[@]}" "$@"
