"""A run's recipe: its sections, how files and overrides become one object, and whether its sizes fit."""

from pear_megatron.errors import RecipeError
from pear_megatron.recipe.check import check_layout
from pear_megatron.recipe.load import load_recipe, to_yaml
from pear_megatron.recipe.sections import (
    CheckpointConfig,
    ClusterConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Recipe",
    "RecipeError",
    "TrainConfig",
    "check_layout",
    "load_recipe",
    "to_yaml",
]
