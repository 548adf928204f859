"""A model back from a run's folder, a converted checkpoint or a Hugging Face one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from pear_megatron.hf.assets import find_root, read_model_file
from pear_megatron.hf.weights import HFWeights
from pear_megatron.megatron.checkpoint import state as checkpoint
from pear_megatron.megatron.checkpoint.paths import resolve
from pear_megatron.megatron.hf_weights import load_weights
from pear_megatron.megatron.initialize import initialize_weights
from pear_megatron.megatron.layout import Layout, initialize
from pear_megatron.megatron.model import build_model
from pear_megatron.recipe import ModelConfig, ParallelConfig, Recipe, RecipeError, TrainConfig
from pear_megatron.recipe.hf_config import model_config
from pear_megatron.recipe.load import validate_as
from pear_megatron.storage import read_settings


def read_run_recipe(run: str | Path) -> Recipe:
    """The resolved recipe that a run wrote into its folder.

    Raises:
        RecipeError: the folder is not a run's.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise RecipeError(f"{run} is not the folder of a run: it has no config.yaml")
    return validate_as(Recipe, path, read_settings(path))


def _build_on_one_rank(recipe: Recipe) -> tuple[Any, Layout]:
    """The recipe's model, uninitialised, on TP = PP = 1."""
    train = TrainConfig(micro_batch_size=1, global_batch_size=1, precision=recipe.train.precision)
    layout = initialize(recipe.model, ParallelConfig(), train)
    model = build_model(recipe.model, layout, train)
    return model, layout


def load_run(run: str | Path) -> tuple[Any, Recipe]:
    """The model of a run's newest checkpoint on TP = PP = 1, in evaluation mode, and its recipe.

    Starts a process group of one; ``pear_megatron.megatron.layout.shutdown`` ends it.

    Args:
        run: the run's ``output_dir``, whatever layout it was trained on.

    Raises:
        RecipeError, CheckpointError: the folder holds no run, or no checkpoint.
    """
    recipe = read_run_recipe(run)
    path = resolve(run)
    model, _ = _build_on_one_rank(recipe)
    checkpoint.load(path, model)
    return model.eval(), recipe


def new_model(recipe: Recipe) -> tuple[Any, Layout]:
    """The recipe's model with its initial weights on TP = PP = 1, and the layout (see load_run)."""
    model, layout = _build_on_one_rank(recipe)
    initialize_weights(model, seed=recipe.seed, vocab_size=recipe.model.vocab_size)
    return model, layout


def load_for_inference(
    path: str | Path,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    expert_parallel: int = 1,
    precision: str | None = None,
) -> tuple[Any, ModelConfig, Layout]:
    """This rank's part of a model, in evaluation mode, with the model's keys and the rank's layout.

    Starts process groups on the ranks that torchrun started (one, without torchrun); more ranks than
    tensor x pipeline parallel size are data parallel. ``pear_megatron.megatron.layout.shutdown`` ends them.

    Args:
        path: a Hugging Face checkpoint's folder; or a run, its checkpoints/, one of them, or the output of
            ``pear-megatron convert``.
        tensor_parallel: ranks that share each layer.
        pipeline_parallel: stages.
        expert_parallel: ranks that share a mixture's experts, each of them whole; every forward pass is then all
            these ranks' together.
        precision: ``bf16`` or ``fp32``; None = that of the stored weights (fp32 for float16 ones).

    Raises:
        RecipeError, CheckpointError: there is no checkpoint, it cannot be read, or the ranks do not fit it.
    """
    if (Path(path) / "config.json").is_file():
        model = model_config(path)
        with HFWeights(path, model) as weights:
            built, layout = _build(
                model, tensor_parallel, pipeline_parallel, expert_parallel, precision or weights.precision
            )
            load_weights(weights, built, layout)
        return built.eval(), model, layout
    checkpoint_folder = resolve(path)
    model, stored_precision = read_model_file(find_root(path))
    built, layout = _build(
        model, tensor_parallel, pipeline_parallel, expert_parallel, precision or stored_precision
    )
    checkpoint.load(checkpoint_folder, built)
    return built.eval(), model, layout


def _build(
    model: ModelConfig, tensor_parallel: int, pipeline_parallel: int, expert_parallel: int, precision: str
) -> tuple[Any, Layout]:
    """This rank's part of the model, unfilled; ranks beyond TP x PP are data parallel."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        expert_model_parallel_size=expert_parallel,
        expert_tensor_parallel_size=1 if expert_parallel > 1 else None,
    )
    from megatron.core.utils import get_model_config

    started = torch.distributed.is_initialized()
    world = torch.distributed.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1"))
    train = TrainConfig.model_validate({"global_batch_size": world, "precision": precision})
    layout = initialize(model, parallel, train)
    built = build_model(model, layout, train)
    # Batches differ in shape: stages tell each other the shape before the tensor.
    get_model_config(built).variable_seq_lengths = True
    return built, layout
