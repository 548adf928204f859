"""A run's recipe: the YAML keys, what they mean, and how files and overrides become one object."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, model_validator

from pear_megatron.config import PearConfig
from pear_megatron.data.config import DataConfig
from pear_megatron.errors import PearError
from pear_megatron.schema import StrictModel


class ModelConfig(StrictModel):
    """A dense Llama/Qwen-like GPT, in Megatron-Core's words."""

    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    ffn_hidden_size: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_query_groups: int | None = None
    kv_channels: int | None = None
    vocab_size: int = Field(ge=2)
    max_position_embeddings: int = Field(ge=1)
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_epsilon: float = Field(default=1e-6, gt=0)
    activation: Literal["swiglu", "gelu"] = "swiglu"
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    rotary_base: int = Field(default=10000, ge=1)
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    share_embeddings_and_output_weights: bool = False
    init_method_std: float = Field(default=0.02, gt=0)
    embedding_init_method_std: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}; change one or set kv_channels"
            )
        groups = self.num_query_groups or self.num_attention_heads
        if self.num_attention_heads % groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_query_groups {groups}"
            )
        return self


class ParallelConfig(StrictModel):
    """How the model is split over ranks; what is left of the world is data parallel."""

    tensor_model_parallel_size: int = Field(default=1, ge=1)
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    use_distributed_optimizer: bool = False


class TrainConfig(StrictModel):
    """Length of the run and size of its batches (sequences of ``data.seq_length`` tokens)."""

    max_steps: int | None = Field(default=None, ge=1)
    num_epochs: int = Field(default=1, ge=1)
    global_batch_size: int = Field(default=64, ge=1)
    micro_batch_size: int = Field(default=1, ge=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    log_interval: int = Field(default=1, ge=1)


class OptimizerConfig(StrictModel):
    """AdamW and its learning-rate schedule, in Megatron's words; steps are optimizer steps."""

    lr: float = Field(default=1e-5, gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    lr_warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    clip_grad: float = Field(default=1.0, ge=0)


class CheckpointConfig(StrictModel):
    """What a run starts from and when it saves; it always saves at its end."""

    pretrained: str | None = None
    save_interval: int | None = Field(default=None, ge=1)
    resume: bool = True


class Recipe(StrictModel):
    """One training run.

    Attributes:
        output_dir: folder of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/.
        seed: of initial weights and data order.
        model, parallel, train, optimizer, checkpoint, data, pear: see their classes.
    """

    output_dir: str
    seed: int = Field(default=1234, ge=0)
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    data: DataConfig
    pear: PearConfig = PearConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data.seq_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.seq_length {self.data.seq_length} exceeds model.max_position_embeddings "
                f"{self.model.max_position_embeddings}"
            )
        return self


class RecipeError(PearError, ValueError):
    """A recipe that cannot be used; the message says which key and what to do."""


def check_layout(model: ModelConfig, parallel: ParallelConfig, train: TrainConfig, world_size: int) -> int:
    """The data-parallel size of a run.

    Raises:
        RecipeError: sizes that do not fit together; names the keys and what to change.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size % (tp * pp):
        raise RecipeError(
            f"parallel.tensor_model_parallel_size {tp} x parallel.pipeline_model_parallel_size {pp} = {tp * pp} "
            f"does not divide the {world_size} process(es) that torchrun started; change them or --nproc-per-node"
        )
    dp = world_size // (tp * pp)
    if train.global_batch_size % (train.micro_batch_size * dp):
        raise RecipeError(
            f"train.global_batch_size {train.global_batch_size} is not divisible by train.micro_batch_size "
            f"{train.micro_batch_size} x {dp} data-parallel rank(s)"
        )
    groups = model.num_query_groups or model.num_attention_heads
    for key, value, size, size_key in (
        ("model.num_attention_heads", model.num_attention_heads, tp, "tensor_model_parallel_size"),
        ("model.num_query_groups", groups, tp, "tensor_model_parallel_size"),
        ("model.ffn_hidden_size", model.ffn_hidden_size, tp, "tensor_model_parallel_size"),
        ("model.num_layers", model.num_layers, pp, "pipeline_model_parallel_size"),
    ):
        if value % size:
            raise RecipeError(f"{key} {value} is not divisible by parallel.{size_key} {size}")
    return dp


def _load_with_defaults(path: Path, seen: tuple[Path, ...] = ()) -> DictConfig:
    """The YAML at ``path`` over what its ``defaults:`` names (a path or a list, relative to the file)."""
    if path in seen:
        raise RecipeError(
            f"{path}: `defaults` goes round in a circle: {' -> '.join(map(str, [*seen, path]))}"
        )
    if not path.is_file():
        from_file = f" (named by `defaults` of {seen[-1]})" if seen else ""
        raise RecipeError(f"no recipe at {path}{from_file}")
    try:
        config = OmegaConf.load(path)
    except Exception as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, found {type(config).__name__}")
    parents = config.pop("defaults", None) or []
    parents = [parents] if isinstance(parents, str) else list(parents)
    merged: Any = OmegaConf.create({})
    for parent in parents:
        merged = OmegaConf.merge(merged, _load_with_defaults((path.parent / parent).resolve(), (*seen, path)))
    return OmegaConf.merge(merged, config)  # type: ignore[return-value]


def _apply_overrides(config: DictConfig, overrides: list[str]) -> DictConfig:
    """Hydra's override grammar: ``key=value``, ``+key=value``, ``~key``."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(overrides=overrides)
        OmegaConf.set_struct(config, False)  # unknown keys are named by validation, with a suggestion
        ConfigLoaderImpl._apply_overrides_to_config(parsed, config)
    except (HydraException, OmegaConfBaseException) as error:
        raise RecipeError(f"override {' '.join(overrides)}: {error}") from error
    return config


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe, its parents and the command line's overrides into one validated object.

    Args:
        path: the YAML file; ``defaults:`` in it names files it inherits from.
        overrides: Hydra-style ``key=value`` strings; they win.

    Raises:
        RecipeError: a missing file, bad YAML, an unknown key (with the nearest known one) or a bad value.
    """
    path = Path(path)
    config = _apply_overrides(_load_with_defaults(path.resolve()), list(overrides or []))
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{path}: {error}") from error
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_describe(error)}") from error


def _describe(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            message = "this key is required"
        shown = problem["type"] not in ("missing", "value_error")
        lines.append(f"{where or 'recipe'}: {message}" + (f" (got {problem['input']!r})" if shown else ""))
    return "; ".join(lines)


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, as a run writes it to ``output_dir/config.yaml``."""
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(mode="json")))


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two resolved recipes."""
    keys: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(f"{prefix}{key}")
    return keys
