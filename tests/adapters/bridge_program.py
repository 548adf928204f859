"""The tiny recipe in Megatron-Bridge's words: its finetune() with PEAR, on CPU ranks (test_bridge.py)."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from tests.adapters import bridge_edge, swift_edge

bridge_edge.install(swift_edge.put_layers if "--hf" in sys.argv else lambda: None)

from megatron.bridge import AutoBridge  # noqa: E402
from megatron.bridge.models.gpt_provider import GPTModelProvider  # noqa: E402
from megatron.bridge.peft.lora import LoRA  # noqa: E402
from megatron.bridge.training import config as bridge  # noqa: E402
from megatron.bridge.training import setup  # noqa: E402
from megatron.bridge.training.tokenizers.config import TokenizerConfig  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402

from pear_megatron import PearConfig  # noqa: E402
from pear_megatron.adapters.bridge import finetune  # noqa: E402
from pear_megatron.data import DataConfig  # noqa: E402

PLAIN = {
    "bias_activation_fusion", "masked_softmax_fusion", "bias_dropout_fusion", "apply_rope_fusion", "batch_p2p_sync",
    "persist_layer_norm", "gradient_accumulation_fusion", "cross_entropy_loss_fusion", "add_bias_linear",
    "share_embeddings_and_output_weights",
}  # fmt: skip


def initialize_on_cpu(*args: Any, **kwargs: Any) -> Any:
    """Bridge makes process groups only where it counts GPUs."""
    count, torch.cuda.device_count = torch.cuda.device_count, lambda: 1
    try:
        return initialize(*args, allow_no_cuda=True, **kwargs)
    finally:
        torch.cuda.device_count = count


initialize, setup.initialize_megatron = setup.initialize_megatron, initialize_on_cpu


def provider(options: argparse.Namespace) -> Any:
    """The tiny recipe's model, or that of a Hugging Face folder in Transformer Engine's layers."""
    if options.hf:
        model = AutoBridge.from_hf_pretrained(options.hf).to_megatron_provider(load_weights=False)
        model.seq_length, model.calculate_per_token_loss, model.use_cpu_initialization = 128, True, True
        for name in PLAIN & vars(model).keys():
            setattr(model, name, False)
        return model
    return GPTModelProvider(
        num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2, vocab_size=1000,
        make_vocab_size_divisible_by=128, normalization="RMSNorm", layernorm_epsilon=1e-6, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, position_embedding_type="rope", rotary_base=10000, seq_length=128,
        attention_dropout=0.0, hidden_dropout=0.0, tensor_model_parallel_size=options.tp,
        pipeline_model_parallel_size=options.pp, pipeline_dtype=torch.float32, use_cpu_initialization=True,
        transformer_layer_spec=lambda config: get_gpt_layer_local_spec(normalization="RMSNorm"),
        transformer_impl="local", calculate_per_token_loss=True, **dict.fromkeys(PLAIN, False),
    )  # fmt: skip


def configuration(options: argparse.Namespace) -> Any:
    decay = 0.0 if options.hf else 0.1
    return bridge.ConfigContainer(
        model=provider(options),
        train=bridge.TrainingConfig(
            train_iters=10,
            exit_interval=options.stop,
            global_batch_size=8,
            micro_batch_size=1 if options.hf else 2,  # a packed row is alone
        ),
        validation=bridge.ValidationConfig(eval_iters=2 if options.validate else 0, eval_interval=5),
        optimizer=bridge.OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            min_lr=0.0,
            weight_decay=decay,
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_eps=1e-8,
            clip_grad=1.0,
            use_distributed_optimizer=False,
            params_dtype=torch.float32,
        ),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style="constant",
            lr_warmup_iters=0,
            start_weight_decay=decay,
            end_weight_decay=decay,
            weight_decay_incr_style="constant",
        ),
        ddp=bridge.DistributedDataParallelConfig(
            average_in_collective=False, use_distributed_optimizer=False
        ),
        dataset=None,
        logger=bridge.LoggerConfig(
            log_interval=1, tensorboard_dir=f"{options.output}/tensorboard", tensorboard_log_interval=1
        ),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=1000),
        checkpoint=bridge.CheckpointConfig(
            pretrained_checkpoint=options.weights,
            save=options.save,
            load=options.save,
            ckpt_format="torch_dist",
            load_rng=False,  # there are no CUDA generators to restore
        ),
        dist=bridge.DistributedInitConfig(distributed_backend="gloo"),
        rng=bridge.RNGConfig(seed=1234),
        peft=LoRA(dim=options.lora, alpha=options.lora) if options.lora else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--data", "--weights", "--output", "--save", "--validate", "--hf"):
        parser.add_argument(name)
    for name, default in (("--tp", 1), ("--pp", 1), ("--lora", 0), ("--stop", None)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    finetune(
        configuration(options),
        data=DataConfig(train=options.data, seq_length=128),
        pear=PearConfig(),
        validation_data=options.validate,
    )


if __name__ == "__main__":
    main()
