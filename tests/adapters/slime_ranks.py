"""slime's own code on CPU ranks, from a checkout: its arguments, rollout manager, training actor and training loop.

What cannot be installed without a GPU (sglang and its router, torch_memory_saver) is an empty module; Ray's object
store hands objects over as they are; the optimizer records gradients instead of stepping; slime's tracker records what
it is given. The model is an embedding and Megatron-Core's vocabulary-parallel output layer, since attention over packed
sequences needs Transformer Engine: a position's logits depend on its own token alone.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import logging
import os
import random
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

from pear_megatron.megatron import cpu

HIDDEN, VOCABULARY, PADDED = 32, 50, 64
_MISSING = {"sglang", "sglang_router", "torch_memory_saver"}
ADAPTER = "pear_megatron.adapters.slime"
MODEL = f"""
    --num-layers 1 --hidden-size {HIDDEN} --ffn-hidden-size 64 --num-attention-heads 4 --vocab-size {VOCABULARY}
    --rotary-base 10000 --norm-epsilon 1e-6 --normalization RMSNorm --untie-embeddings-and-output-weights --swiglu
    --disable-bias-linear --position-embedding-type rope --transformer-impl local --attention-backend unfused --lr 1e-5
"""
PEAR = f"""
    --rollout-function-path {ADAPTER}.generate_rollout
    --rollout-data-postprocess-path {ADAPTER}.postprocess_rollout_data
    --loss-type custom_loss --custom-loss-function-path {ADAPTER}.loss_function
    --calculate-per-token-loss --disable-compute-advantages-and-returns --debug-train-only
"""


class _Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules without anything real in them, in place of those that are not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in _MISSING:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module: Any) -> None:
        pass


def use_checkout(checkout: str) -> None:
    """Makes ``slime`` importable in this process, without a GPU."""
    cpu.enable_training()
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
        sys.meta_path.append(_Missing())  # asked last: what is installed comes first
    from slime.utils import accelerator

    backend = MagicMock(spec=accelerator.Accelerator, communication_backend_name="gloo", device_type="cpu")
    backend.device.return_value = backend.current_device.return_value = torch.device("cpu")
    backend.mem_get_info.return_value = (1 << 40, 1 << 40)
    backend.memory_allocated.return_value = backend.memory_reserved.return_value = 0
    backend.communication_backend = lambda default: "gloo"
    accelerator.set_accelerator(backend)


def write_rows(path: Path, count: int, *, longest: int = 40, seed: int = 0) -> Path:
    """Random trajectories of one or two turns, with rewards of both signs."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        turns = [(0, rng.randint(1, 6)), (1, rng.randint(2, 12))] * rng.randint(1, 2) + [
            (0, rng.randint(0, 3))
        ]
        mask = [turn for turn, tokens in turns for _ in range(tokens)][:longest]
        row = {
            "id": f"row-{i}",
            "input_ids": [rng.randrange(VOCABULARY) for _ in mask],
            "loss_mask": mask,
            "behavior_logprobs": [-3.8 - 0.4 * rng.random() if m else 0.0 for m in mask],
            "reward": rng.choice([1.0, 2.5, -0.5]),
        }
        rows.append(json.dumps(row) + "\n")
    path.write_text("".join(rows))
    return path


def parse(folder: Path, settings: dict[str, Any], *options: str) -> Any:
    """slime's arguments by its own parser, with ``settings`` in the file of --custom-config-path."""
    from slime.utils import arguments

    model = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": VOCABULARY,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(model))
    (folder / "pear.yaml").write_text(json.dumps(settings))
    files = [
        "--hf-checkpoint",
        str(folder),
        "--ref-load",
        str(folder),
        "--custom-config-path",
        str(folder / "pear.yaml"),
    ]
    given, sys.argv = sys.argv, ["train.py", *MODEL.split(), *PEAR.split(), *files, *options]
    try:
        return arguments.parse_args()
    finally:
        sys.argv = given


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    """Of the embedding and the output layer, [PADDED, HIDDEN] float32 each; no row of the padding is 0."""
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(PADDED, HIDDEN, generator=generator) * scale for scale in (1.0, 0.15))  # type: ignore[return-value]


def _model(tp: int, cp: int) -> Any:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.enums import ModelType
    from megatron.core.transformer import MegatronModule, TransformerConfig

    class Bigram(MegatronModule):
        model_type = ModelType.encoder_or_decoder

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            embedding, output = weights()
            self.embedding = torch.nn.Embedding.from_pretrained(embedding, freeze=False)
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                HIDDEN,
                PADDED,
                config=config,
                init_method=torch.nn.init.zeros_,
                bias=False,
                gather_output=False,
            )
            rank = parallel_state.get_tensor_model_parallel_rank()
            self.output_layer.weight.data.copy_(output.chunk(tp)[rank])

        def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            hidden = self.embedding(input_ids).transpose(0, 1)  # [T, 1, H]
            return self.output_layer(hidden)[0].transpose(0, 1)

        def set_input_tensor(self, _: Any) -> None:
            pass

    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, tensor_model_parallel_size=tp,
        context_parallel_size=cp, calculate_per_token_loss=True, use_cpu_initialization=True,
    )  # fmt: skip
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    return DistributedDataParallel(config, ddp, Bigram(config))


class _Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


class _Recorder:
    """In the optimizer's place: keeps the gradient of every step, as Megatron has it after all reductions."""

    param_groups: tuple[Any, ...] = ()

    def __init__(self, model: Any) -> None:
        self.model, self.gradients = model, list[dict[str, torch.Tensor]]()

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def zero_grad(self) -> None:
        pass

    def step(self) -> tuple[bool, float, None]:
        self.gradients.append({name: p.main_grad.clone() for name, p in self.model.module.named_parameters()})
        return True, 0.0, None


def train_a_rollout(
    rank: int,
    checkout: str,
    folder: Path,
    settings: dict[str, Any],
    number: int,
    tp: int,
    cp: int,
    *options: str,
) -> dict[str, Any]:
    """slime's way from ``generate`` to the step, for one rollout -> gradients and report of each step, warnings."""
    use_checkout(checkout)
    world = torch.distributed.get_world_size()
    here = folder / f"rank-{rank}"
    here.mkdir()
    args = parse(
        here, settings, "--tensor-model-parallel-size", str(tp), "--context-parallel-size", str(cp),
        "--actor-num-gpus-per-node", str(world), *options,
    )  # fmt: skip

    from megatron.core import parallel_state
    from megatron.training.global_vars import set_args
    from slime.backends.megatron_utils import actor as actors
    from slime.observability import logging_utils
    from slime.observability.timer import Timer
    from slime.ray import rollout as rollouts
    from slime.utils import data, reloadable_process_group
    from slime.utils.misc import load_function

    reported: list[dict[str, float]] = []
    logging_utils.log = lambda args, values, step_key: reported.append(values)
    rollouts.ray.put, data.ray.get = lambda value, **_: value, lambda value: value

    # As the training actor starts: process groups that can be taken down and made again.
    from slime.utils.distributed_utils import init_gloo_group

    reloadable_process_group.monkey_patch_torch_dist()
    init_gloo_group()
    reloadable_process_group.register_default_process_group(timedelta(minutes=2))
    set_args(args)
    parallel_state.initialize_model_parallel(tp, context_parallel_size=cp, create_gloo_process_groups=True)

    manager = object.__new__(rollouts.RolloutManager.__ray_metadata__.modified_class)
    manager.args, manager.data_source, manager._health_monitors, manager.servers = args, None, [], {}
    manager.generate_rollout = load_function(args.rollout_function_path)
    manager.custom_reward_post_process_func = manager.custom_convert_samples_to_train_data_func = None
    manager.set_train_parallel_config(
        {"dp_size": world // tp // cp, "cp_size": cp, "vpp_size": 1, "microbatch_group_size_per_vp_stage": 1}
    )

    actor = object.__new__(actors.MegatronTrainRayActor)
    actor.args, actor.role = args, "actor"
    actor.model = [_model(tp, cp)]
    actor.optimizer, actor.opt_param_scheduler = _Recorder(actor.model[0]), MagicMock()
    actor.weights_backuper, actor.prof, actor.weight_updater = (
        MagicMock(backup_tags=()),
        MagicMock(),
        MagicMock(),
    )
    actor.rollout_data_postprocess = load_function(args.rollout_data_postprocess_path)
    actors.train_metric_utils.log_perf_data = MagicMock()

    Timer().start("train_wait")
    said: list[str] = []
    logging.getLogger("pear_megatron").addHandler(_Said(said))
    actor.train(number, manager.generate(number))
    return {
        "gradients": actor.optimizer.gradients,
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
        "reported": [values for values in reported if "train/step" in values],
        "said": said,
    }
