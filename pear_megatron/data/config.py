"""DataConfig: which offline trajectories are trained on, and how they become rows of a batch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from pear_megatron.schema import StrictModel


class DataConfig(StrictModel):
    """The ``data:`` section of a recipe.

    Attributes:
        train: JSONL (``.jsonl``, ``.jsonl.gz``) and Parquet files, globs allowed; one string will do.
        seq_length: positions in a row of a batch; a trajectory of n tokens takes n - 1 of them.
        packing: put several trajectories into a row; False gives each trajectory a row of its own.
        tokenizer: Hugging Face name or local folder (one with a single ``.gguf`` file will do); needed
            by rows of text, and to refuse token ids that another tokenizer made.
        chat_template: file with a Jinja chat template, used instead of the tokenizer's own.
        chat_template_kwargs: arguments of the template for all rows (``enable_thinking``, ...); a row's own go
            over them.
        multi_turn: how a conversation of several assistant turns becomes tokens. ``whole``: one trajectory.
            ``split``: every assistant turn one of its own, in the context that it was generated in. ``auto``:
            whole where that has the same contexts, else split.
        overlong: what to do with a trajectory that does not fit into ``seq_length``.
        truncated: what to do with a row marked ``truncated``: its response lost its suffix, so that its
            weights would be those of another trajectory (docs/method.md, Where it goes wrong).
        cache_dir: where the tokenised trajectories are kept; default ``.pear_cache`` beside the first
            file. Every node must see it.

    Raises:
        pydantic.ValidationError: (a ``ValueError``) on an unknown key or a bad value.
    """

    train: list[str] = Field(min_length=1)
    seq_length: int = Field(ge=1)
    packing: bool = True
    tokenizer: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    multi_turn: Literal["auto", "whole", "split"] = "auto"
    overlong: Literal["error", "drop"] = "error"
    truncated: Literal["drop", "error", "keep"] = "drop"
    cache_dir: str | None = None

    @field_validator("train", mode="before")
    @classmethod
    def _one_file_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value
