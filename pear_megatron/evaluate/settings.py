"""EvalSettings: all that determines the samples of an evaluation; another evaluation has another folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pear_megatron.errors import EvalError
from pear_megatron.evaluate.samples import FILE
from pear_megatron.evaluate.sampling import Sampling
from pear_megatron.schema import StrictModel
from pear_megatron.storage import describe_changes, read_settings, write_atomically

_FILE = "settings.json"
# Two checkpoints compared may differ in these, and in nothing else.
OF_THE_RUN = ("model", "weights", "num_samples", "seed", "engine", "dtype")


class EvalSettings(StrictModel):
    """Settings of an evaluation, as settings.json keeps them.

    Attributes:
        model: folder of the Hugging Face checkpoint.
        weights: digest of its configuration and weights.
        problems: digest of the problems' ids and prompts.
        grading: digest of their answers and the grader; another one grades the same responses again.
        num_samples: responses to each problem.
        temperature, top_p, max_new_tokens: see Sampling.
        seed: of the samples.
        chat_template_kwargs: arguments of the chat template.
        engine, dtype: see ``engines.load_engine``.
    """

    model: str
    weights: str
    problems: str
    grading: str
    num_samples: int = Field(ge=1)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)
    chat_template_kwargs: dict[str, Any] | None = None
    engine: Literal["transformers", "vllm"] = "transformers"
    dtype: Literal["bf16", "fp32"] = "fp32"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"temperature 0 gives one response {self.num_samples} times; set num_samples to 1"
            )
        return self

    @property
    def sampling(self) -> Sampling:
        """The part that an engine needs."""
        return Sampling(self.temperature, self.top_p, self.max_new_tokens)


def check_folder(output: Path, settings: EvalSettings) -> bool:
    """Whether responses in the folder must be graded again; EvalError if they are of other settings."""
    output.mkdir(parents=True, exist_ok=True)
    path, samples = output / _FILE, output / FILE
    if not path.exists() or not samples.exists() or not samples.stat().st_size:
        return False
    old = read_settings(path)
    if changed := describe_changes(old, settings.model_dump(mode="json"), but=("model", "grading")):
        raise EvalError(
            f"{output} holds an evaluation with other settings: {changed}; choose another --output, or delete "
            "that folder to begin anew"
        )
    return bool(old.get("grading") != settings.grading)


def write_settings(output: Path, settings: EvalSettings) -> None:
    """Makes the folder this evaluation's own."""
    write_atomically(output / _FILE, settings.model_dump_json(indent=2) + "\n")
