"""The base of every configuration object: frozen, validated, and helpful about misspelt keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


class UnknownKey(ValueError):
    """A key that a model does not have, with one that may be meant: the model's, or ``root``'s, which holds it."""

    def __init__(self, model: type[BaseModel], key: Any, root: type[BaseModel] | None = None) -> None:
        self.model, self.key = model, key
        known = list(model.model_fields)
        inside = {
            name: f"{section}.{name}" for section, kind in _sections(model) for name in kind.model_fields
        }
        here, outside = _places(model, key), _places(root, key) if root else []
        near = (
            here
            or outside
            or difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            or [inside[name] for name in difflib.get_close_matches(str(key), inside, n=1, cutoff=0.7)]
        )
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        if outside and not here and "." not in outside[0]:
            hint = f"did you mean {outside[0]!r} outside of this section?"
        super().__init__(f"unknown key {key!r}; {hint}")


class StrictModel(BaseModel):
    """A pydantic model that refuses unknown keys and names the nearest one it knows.

    Raises:
        pydantic.ValidationError: (a ``ValueError``) on an unknown key or a bad value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy in which ``update`` is validated as a new object is."""
        values = {name: getattr(self, name) for name in self.model_fields_set} | dict(update or {})
        return type(self).model_validate(values)

    @model_validator(mode="before")
    @classmethod
    def _suggest_for_unknown_keys(cls, values: Any) -> Any:
        for key, value in values.items() if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                raise UnknownKey(cls, key)
            kinds = {cls.model_fields[key].annotation, *get_args(cls.model_fields[key].annotation)}
            if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
                raise ValueError(f"{key} is a number, and {str(value).lower()} is none")
        return values


# What other trainers (Hugging Face, TRL, axolotl, torchtitan, NeMo, Megatron's command line) call the keys of recipes.
_OTHER_NAMES = {
    name: ours
    for ours, names in {
        "lr": "learning_rate",
        "lr_warmup_steps": "warmup_steps num_warmup_steps warmup_iters lr_warmup_iters",
        "lr_decay_style": "lr_scheduler_type lr_scheduler scheduler",
        "clip_grad": "max_grad_norm gradient_clipping gradient_clip_val max_norm",
        "adam_eps": "adam_epsilon eps",
        "num_epochs": "num_train_epochs epochs max_epochs",
        "max_steps": "train_iters steps max_num_steps train_steps",
        "global_batch_size": "batch_size train_batch_size gradient_accumulation_steps train_global_batch_size",
        "micro_batch_size": "per_device_train_batch_size local_batch_size train_micro_batch_size",
        "seq_length": "max_length max_seq_length max_seq_len seq_len sequence_len cutoff_len max_total_sequence_length",
        "precision": "bf16 fp16 dtype torch_dtype",
        "recompute_granularity": "gradient_checkpointing activation_checkpointing",
        "log_interval": "logging_steps log_freq",
        "eval_interval": "eval_steps",
        "save_interval": "save_steps save_period",
        "keep_last": "save_total_limit",
        "hf": "path model_name model_name_or_path base_model",
        "rank": "r lora_rank lora_r",
        "alpha": "lora_alpha",
        "tensor_model_parallel_size": "tp tp_size tensor_parallel_size tensor_parallel_degree",
        "pipeline_model_parallel_size": "pp pp_size pipeline_parallel_size pipeline_parallel_degree",
        "context_parallel_size": "cp cp_size context_parallel_degree",
        "expert_model_parallel_size": "ep ep_size expert_parallel_size expert_parallel_degree",
    }.items()
    for name in names.split()
}


def _places(model: type[BaseModel], key: Any) -> list[str]:
    """Where the key, or what another trainer calls so, is one of the model or of a section in it, as dotted keys."""
    for name in (key, _OTHER_NAMES.get(key, key)):
        if name in model.model_fields:
            return [str(name)]
        if found := [f"{section}.{name}" for section, kind in _sections(model) if name in kind.model_fields]:
            return found
    return []


def _sections(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """The fields of a model that are models, those that may be null among them."""
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield name, kind


def describe(error: ValidationError, what: str = "recipe", root: type[BaseModel] | None = None) -> str:
    """What is wrong with which keys, in one line.

    Args:
        error: of validation.
        what: stands for the whole.
        root: the whole's model, in whose sections an unknown key is looked for.
    """
    lines = []
    for problem in error.errors():
        # without the members of a union, list[str] | list[DataSource], each of which says the same
        where = ".".join(str(part) for part in problem["loc"] if "[" not in str(part))
        message = problem["msg"].removeprefix("Value error, ")
        if isinstance(unknown := problem.get("ctx", {}).get("error"), UnknownKey):
            message = str(UnknownKey(unknown.model, unknown.key, root))
        if problem["type"] == "missing":
            message = "this key is required"
        if problem["type"] == "tuple_type":
            message = "give a list, as [low,high]"
        shown = problem["type"] not in ("missing", "value_error")
        lines.append(f"{where or what}: {message}" + (f" (got {problem['input']!r})" if shown else ""))
    return "; ".join(dict.fromkeys(lines))
