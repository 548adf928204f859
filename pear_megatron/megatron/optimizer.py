"""Megatron-Core's own optimizer and learning-rate scheduler, set from a recipe."""

from __future__ import annotations

from typing import Any

import torch

from pear_megatron.megatron.model import as_chunks
from pear_megatron.recipe import Recipe


def build_optimizer(recipe: Recipe, model: Any) -> Any:
    """AdamW on float32 main parameters, gradient clipping over the whole model (one, or a list of chunks)."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    settings = recipe.optimizer
    bf16 = recipe.train.precision == "bf16"
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=recipe.parallel.use_distributed_optimizer,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
    )
    return get_megatron_optimizer(config, as_chunks(model))


def build_scheduler(recipe: Recipe, optimizer: Any, total_steps: int) -> Any:
    """Megatron's OptimizerParamScheduler, counted in optimizer steps."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    settings = recipe.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=min(settings.lr_warmup_steps, total_steps - 1),
        lr_decay_steps=total_steps,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def _on_torch_adam(optimizer: Any) -> Any | None:
    """The distributed optimizer in ``optimizer`` if it runs torch's own Adam: without Apex and TE, so on CPU."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer) and isinstance(
            part.optimizer, torch.optim.Adam | torch.optim.AdamW
        ):
            return part
    return None


def prepare_to_load(optimizer: Any) -> None:
    """Allocates the state that mcore's distributed optimizer takes for given when it is to load one."""
    part = _on_torch_adam(optimizer)
    if part is None:
        return
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            if not part.optimizer.state[parameter]:
                part.optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict(state)``, with torch's Adam in a distributed optimizer too.

    torch's Adam keeps a step for every parameter. mcore does not expect it among the tensors to load, and
    gives all parameters one tensor, which Adam would count up for each of them.
    """
    part = _on_torch_adam(optimizer)
    if part is None:
        optimizer.load_state_dict(state)
        return
    state = dict(state)
    tensors = state.pop("param_state")
    optimizer.load_state_dict(state)
    states = list(part.optimizer.state.values())
    steps = [one.pop("step") for one in states]
    part.load_parameter_state_from_fully_reshardable(tensors)
    for one, step in zip(states, steps, strict=True):
        one["step"] = step.clone()
