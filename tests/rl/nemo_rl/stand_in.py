"""A folder that looks like a NeMo-RL checkout: the keys that our recipes meet there, and a loader of ours.

With NEMO_RL_DIR set the same tests run over the checkout it names as well.
"""

from __future__ import annotations

from pathlib import Path

LOADER = """
from pathlib import Path
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

def register_omegaconf_resolvers():
    OmegaConf.register_new_resolver("mul", lambda a, b: a * b, replace=True)

def merge_with_override(base, config):
    return OmegaConf.merge(base, config)

def load_config(path):
    config = OmegaConf.load(path)
    defaults = config.pop("defaults", [])
    merged = OmegaConf.create({})
    for parent in [defaults] if isinstance(defaults, str) else defaults:
        merged = OmegaConf.merge(merged, load_config(Path(path).parent / str(parent)))
    return OmegaConf.merge(merged, config)

def parse_hydra_overrides(config, overrides):
    OmegaConf.set_struct(config, True)
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(overrides), config)
    return config
"""

# Values as NeMo-RL had them at 7ea279ab, where a test depends on them.
BASE_1B = """
grpo: {num_prompts_per_step: 32, num_generations_per_prompt: 16, max_num_steps: 1000000, val_period: 10,
  val_at_start: false, val_at_end: false, max_val_samples: 256, val_batch_size: 256, val_num_generations_per_prompt: 1}
loss_fn: {force_on_policy_ratio: false, reference_policy_kl_penalty: 0.01}
checkpointing: {enabled: false, checkpoint_dir: results/grpo, metric_name: "val:accuracy", save_period: 10,
  checkpoint_must_save_by: null}
policy:
  model_name: Qwen/Qwen2.5-1.5B
  tokenizer: {name: "${policy.model_name}", chat_template_kwargs: null}
  hf_config_overrides: {}
  train_global_batch_size: 512
  train_micro_batch_size: 4
  logprob_batch_size: ${policy.train_micro_batch_size}
  max_total_sequence_length: 512
  logprob_chunk_size: null
  optimizer: null
  dtensor_cfg: {enabled: false}
  make_sequence_length_divisible_by: ${policy.megatron_cfg.tensor_model_parallel_size}
  sequence_packing:
    enabled: true
    train_mb_tokens: ${mul:${policy.max_total_sequence_length}, ${policy.train_micro_batch_size}}
    logprob_mb_tokens: ${mul:${policy.max_total_sequence_length}, ${policy.logprob_batch_size}}
  megatron_cfg:
    enabled: true
    force_reconvert_from_hf: false
    activation_checkpointing: false
    defer_fp32_logits: false
    tensor_model_parallel_size: 1
    pipeline_model_parallel_size: 1
    context_parallel_size: 1
    num_layers_in_first_pipeline_stage: null
    num_layers_in_last_pipeline_stage: null
    sequence_parallel: false
    expert_tensor_parallel_size: 1
    expert_model_parallel_size: 1
    env_vars: null
    optimizer: {lr: 5.0e-6, min_lr: 5.0e-7}
    scheduler: {lr_warmup_iters: 13, lr_warmup_init: 5.0e-7}
  generation:
    temperature: 1.0
    stop_token_ids: null
    vllm_cfg: {async_engine: false, tensor_parallel_size: 1, pipeline_parallel_size: 1,
      max_model_len: "${policy.max_total_sequence_length}",
      gpu_memory_utilization: 0.6}
    vllm_kwargs: {}
    colocated: {enabled: true, resources: {gpus_per_node: null, num_nodes: null}}
data:
  max_input_seq_length: ${policy.max_total_sequence_length}
  train: {dataset_name: OpenMathInstruct-2, split_validation_size: 0.05}
  validation: null
  default: {prompt_file: examples/prompts/cot.txt, system_prompt_file: null, processor: math_hf_data_processor,
    env_name: math}
env: {math: {num_workers: 8}}
logger: {log_dir: logs, tensorboard_enabled: false, wandb: {project: grpo-dev}}
cluster: {gpus_per_node: 1, num_nodes: 1}
"""
BASE_8B = """
defaults: grpo_math_1B_megatron.yaml
grpo: {num_prompts_per_step: 64, num_generations_per_prompt: 32}
policy:
  model_name: meta-llama/Llama-3.1-8B-Instruct
  train_micro_batch_size: 1
  logprob_batch_size: 4
  max_total_sequence_length: 4096
  megatron_cfg:
    pipeline_model_parallel_size: 2
    optimizer: {lr: 3.0e-7, min_lr: 3.0e-8}
cluster: {gpus_per_node: 8}
"""
GYM = """
grpo: {val_batch_size: null}
policy: {generation: {vllm_cfg: {expose_http_server: true}}}
data: {train: {data_path: x}}
env: {should_use_nemo_gym: true, should_log_nemo_gym_responses: true, nemo_gym: {config_paths: []}}
"""

FILES = {
    "nemo_rl/utils/config.py": LOADER,
    "examples/run_grpo.py": "",
    "examples/nemo_gym/run_grpo_nemo_gym.py": "",
    "examples/nemo_gym/grpo.yaml": GYM,
    "examples/prompts/cot.txt": "{}",
    "examples/configs/grpo_math_1B_megatron.yaml": BASE_1B,
    "examples/configs/grpo_math_8B_megatron.yaml": BASE_8B,
}


def write_stand_in(folder: Path) -> Path:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
