"""Megatron-Core's own optimizer and learning-rate scheduler, set from a recipe."""

from __future__ import annotations

import logging
from typing import Any

import torch

from pear_megatron.megatron.attention import INSTALL
from pear_megatron.megatron.model import as_chunks
from pear_megatron.recipe import Recipe, RecipeError

log = logging.getLogger("pear_megatron")


_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.uint8}


def build_optimizer(recipe: Recipe, model: Any) -> Any:
    """The recipe's optimizer on main parameters, with gradient clipping over the whole model (or a list of chunks)."""
    from megatron.core.optimizer import get_megatron_optimizer

    return get_megatron_optimizer(optimizer_config(recipe), as_chunks(model))


def optimizer_config(recipe: Recipe) -> Any:
    """megatron.core's OptimizerConfig.

    Raises:
        RecipeError: this machine has not the packages that the optimizer needs.
    """
    from megatron.core.optimizer import OptimizerConfig

    settings = recipe.optimizer
    bf16 = recipe.train.precision == "bf16"
    same = (
        *("optimizer", "lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad"),
        *("muon_momentum", "muon_extra_scale_factor"),
        *("use_precision_aware_optimizer", "optimizer_cpu_offload", "optimizer_offload_fraction"),
    )
    dtypes = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
    if settings.optimizer == "muon":
        _require_muon()
    try:
        return OptimizerConfig(
            **{key: getattr(settings, key) for key in same},
            **{key: _DTYPES[getattr(settings, key)] for key in dtypes},
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=recipe.parallel.use_distributed_optimizer,
            overlap_param_gather=recipe.parallel.overlap_param_gather,
            muon_tp_mode="duplicated",  # the update of the whole matrix, whatever the layout
        )
    except (RuntimeError, TypeError, AssertionError) as error:  # 0.16 compares the version of no package
        if not settings.use_precision_aware_optimizer:
            raise
        said = "" if isinstance(error, TypeError) else f": {error}"
        raise RecipeError(
            f"optimizer.use_precision_aware_optimizer needs Transformer Engine ({INSTALL}){said}; install it, or leave "
            "use_precision_aware_optimizer and optimizer_cpu_offload out"
        ) from error


def _require_muon() -> None:
    try:
        from megatron.core.optimizer.emerging_optimizers import HAVE_EMERGING_OPTIMIZERS as installed
    except ImportError as error:
        raise RecipeError(
            "optimizer.optimizer muon needs a newer megatron-core (0.19 has it as it is used here); update it, or set "
            "optimizer.optimizer=adam"
        ) from error
    if not installed:
        raise RecipeError(
            "optimizer.optimizer muon needs NVIDIA's emerging-optimizers (pip install 'pear-megatron[muon]', Python "
            "3.12); install it, or set optimizer.optimizer=adam"
        )


def build_scheduler(recipe: Recipe, optimizer: Any, total_steps: int) -> Any:
    """Megatron's OptimizerParamScheduler, counted in optimizer steps; the recipe's schedule, also when resumed.

    Raises:
        RecipeError: the schedule ends at a learning rate of 0 while the run goes on.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    settings = recipe.optimizer
    decay_steps = settings.lr_decay_steps or total_steps
    if decay_steps < total_steps and settings.min_lr == 0 and settings.lr_decay_style != "constant":
        raise RecipeError(
            f"optimizer.lr_decay_steps {decay_steps} is less than the run's {total_steps} steps and "
            f"optimizer.min_lr is 0: from step {decay_steps + 1} on nothing would be trained; leave "
            "lr_decay_steps out (the schedule then takes all steps), raise it, or set min_lr"
        )
    warmup_steps = min(settings.lr_warmup_steps, decay_steps - 1)
    if warmup_steps < settings.lr_warmup_steps:
        log.warning(
            "optimizer.lr_warmup_steps %d is not less than the %d steps of the learning-rate schedule; warming up "
            "over %d",
            settings.lr_warmup_steps,
            decay_steps,
            warmup_steps,
        )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    scheduler.total_steps = total_steps  # of the run
    return scheduler


def load_scheduler(scheduler: Any, state: dict[str, Any]) -> None:
    """Advances the recipe's schedule to the step of a checkpoint; says so if the run had another one so far.

    Args:
        scheduler: of ``build_scheduler``.
        state: what ``state_dict`` of the checkpoint's scheduler gave.
    """
    scheduler.load_state_dict(state)
    now = scheduler.state_dict()
    changed = [
        f"{key} {now[key]} (was {state[key]})"
        for key in ("lr_warmup_steps", "lr_decay_steps")
        if now[key] != state[key]
    ]
    if now["num_steps"] >= scheduler.total_steps:
        return  # there is nothing left to plan
    if changed and (
        scheduler.lr_decay_style != "constant" or now["lr_warmup_steps"] != state["lr_warmup_steps"]
    ):
        log.warning(
            "the learning rate is re-planned from step %d on: %s; the next step has lr %.3g",
            now["num_steps"] + 1,
            ", ".join(changed),
            scheduler.optimizer.param_groups[0]["lr"],
        )


def _on_torch_adam(optimizer: Any) -> list[Any]:
    """The distributed optimizers in ``optimizer`` that run torch's own Adam: without Apex and TE, so on CPU."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return [
        part
        for part in _parts(optimizer)
        if isinstance(part, DistributedOptimizer)
        and isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW)
    ]


def _parts(optimizer: Any) -> list[Any]:
    """mcore's optimizers of a model: one, or the dense parameters' and the experts'."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _on_the_host(optimizer: Any) -> list[Any]:
    """mcore's optimizers whose state is shared out between GPU and host."""
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    hybrids = [part.optimizer for part in _parts(optimizer)]
    return [hybrid for hybrid in hybrids if isinstance(hybrid, HybridDeviceOptimizer)]


def prepare_to_load(optimizer: Any) -> None:
    """Allocates the state that mcore's distributed optimizer takes for given when it is to load one.

    With a state on the host that is a step along random numbers, so that weights are to be loaded afterwards.
    """
    for hybrid in _on_the_host(optimizer):
        hybrid.dummy_step()
    for part in _on_torch_adam(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if not part.optimizer.state[parameter]:
                    part.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def load_optimizer(optimizer: Any, state: dict[Any, Any]) -> None:
    """``optimizer.load_state_dict(state)``, with torch's Adam in a distributed optimizer too.

    torch's Adam keeps a step for every parameter. mcore does not expect it among the tensors to load, and
    gives all parameters one tensor, which Adam would count up for each of them.
    """
    if not _on_torch_adam(optimizer):
        optimizer.load_state_dict(state)
        for hybrid in _on_the_host(optimizer):
            for own in hybrid.state.values():
                own |= {key: step.clone() for key, step in own.items() if key == "step"}
        return
    parts = _parts(optimizer)
    states = [state] if len(parts) == 1 else [state[i] for i in range(len(parts))]
    for part, own in zip(parts, states, strict=True):
        _load_torch_adam(part, dict(own))


def _load_torch_adam(part: Any, state: dict[str, Any]) -> None:
    tensors = state.pop("param_state")
    part.load_state_dict(state)
    states = list(part.optimizer.state.values())
    steps = [one.pop("step") for one in states]
    part.load_parameter_state_from_fully_reshardable(tensors)
    for one, step in zip(states, steps, strict=True):
        one["step"] = step.clone()
