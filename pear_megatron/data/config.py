"""DataConfig: which offline trajectories are trained on, and how they become rows of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pear_megatron.schema import StrictModel


class DataSource(StrictModel):
    """One of several data sets that are trained on together.

    Attributes:
        path: files, as ``data.train`` has them.
        name: what metrics call it.
        weight: its share of what is trained on, in proportion to the other sources' weights; given for all of
            them or for none. None = in proportion to its size.
    """

    path: list[str] = Field(min_length=1)
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    weight: float | None = Field(default=None, gt=0)

    @field_validator("path", mode="before")
    @classmethod
    def _one_file_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class DataConfig(StrictModel):
    """The ``data:`` section of a recipe.

    Attributes:
        train: JSONL (``.jsonl``, ``.jsonl.gz``) and Parquet files, globs allowed; one string will do. Or a list of
            sources, ``{path, name, weight}``.
        blend_by: what the sources' weights are shares of: ``trajectories``, or their ``tokens``.
        validation: held-out trajectories, as ``train``, without weights; None = no evaluation.
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
    """

    train: list[str] | list[DataSource] = Field(min_length=1)
    blend_by: Literal["trajectories", "tokens"] = "trajectories"
    validation: list[str] | list[DataSource] | None = Field(default=None, min_length=1)
    seq_length: int = Field(ge=1)
    packing: bool = True
    tokenizer: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    multi_turn: Literal["auto", "whole", "split"] = "auto"
    overlong: Literal["error", "drop"] = "error"
    truncated: Literal["drop", "error", "keep"] = "drop"
    cache_dir: str | None = None

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _files_or_sources(cls, value: Any) -> Any:
        """One string or source will do; what is given decides which kind of list is meant, for clear errors."""
        if isinstance(value, str | dict | DataSource):
            value = [value]
        if not isinstance(value, list):
            return value
        named = [not isinstance(entry, str) for entry in value]
        if any(named) and not all(named):
            raise ValueError(
                "a list of files and sources mixed; give every entry as {path: ..., name: ...}, or all as files"
            )
        return [DataSource.model_validate(entry) for entry in value] if any(named) else value

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        for key in ("train", "validation"):
            sources = getattr(self, key) or []
            names = [source.name for source in sources if isinstance(source, DataSource)]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(
                    f"{key}: two sources are named {twice[0]!r}; metrics need names of their own"
                )
        weights = [source.weight for source in self.train if isinstance(source, DataSource)]
        if None in weights and any(weights):
            raise ValueError(
                "train: some sources have a weight and some have none; give all of them one, or none "
                "(in proportion to their sizes)"
            )
        if any(isinstance(s, DataSource) and s.weight is not None for s in self.validation or []):
            raise ValueError(
                "validation: a source has a weight; every held-out trajectory counts once, leave it out"
            )
        if self.blend_by != "trajectories" and not any(weights):
            raise ValueError(f"blend_by {self.blend_by} is what weights are shares of, and no source has one")
        return self

    @property
    def train_sources(self) -> list[DataSource]:
        """``train`` as sources; files alone are a single one."""
        return as_sources(self.train)

    @property
    def train_files(self) -> list[str]:
        """Files and globs of all sources."""
        return [file for source in self.train_sources for file in source.path]

    def in_run(self, output_dir: str) -> Self:
        """The section of the run in a folder: what is prepared goes there, unless ``cache_dir`` says where."""
        return self.model_copy(update={"cache_dir": self.cache_dir or str(Path(output_dir) / "data_cache")})


def as_sources(given: list[str] | list[DataSource]) -> list[DataSource]:
    """Sources as they are, and files as a single one, named ``all``."""
    sources = [entry for entry in given if isinstance(entry, DataSource)]
    return sources or [DataSource(path=[str(entry) for entry in given], name="all")]
