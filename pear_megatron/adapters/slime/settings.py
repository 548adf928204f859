"""PEAR's settings among slime's arguments, and the arguments that would spoil the loss or lose data."""

from __future__ import annotations

import argparse
from typing import Any

from pydantic import Field, ValidationError, field_validator

from pear_megatron.config import PearConfig
from pear_megatron.data.columns import require_supported
from pear_megatron.errors import RecipeError

PREFIX = "pear_"
_HOOK = "pear_megatron.adapters.slime.postprocess_rollout_data"
# slime's arguments: the name in its namespace, what it must be, the option to give or to leave out, and why.
_Rule = tuple[str, Any, str, str]
_OF_THE_LOSS: tuple[_Rule, ...] = (
    ("calculate_per_token_loss", True, "--calculate-per-token-loss",
     "without it slime divides by the number of samples, and PEAR's loss is a sum over decisions"),
    ("compute_advantages_and_returns", False, "--disable-compute-advantages-and-returns",
     "the advantages that it computes would stand where PEAR's rewards do, after a forward pass of their own"),
    ("rollout_data_postprocess_path", _HOOK, f"--rollout-data-postprocess-path {_HOOK}",
     "it carries the rewards to the loss"),
    ("custom_reward_post_process_path", None, "no --custom-reward-post-process-path",
     "the loss takes the rewards as the samples have them, and would ignore what it makes of them"),
    ("rollout_temperature", 1.0, "no --rollout-temperature, or 1",
     "ratios compare log-probs at temperature 1"),
    ("rollout_top_p", 1.0, "no --rollout-top-p, or 1",
     "log-probs of a truncated distribution are no behaviour log-probs"),
    ("recompute_loss_function", False, "no --recompute-loss-function",
     "the loss keeps nothing but the logits, so nothing would be gained, and it would count each micro-batch twice"),
    ("use_critic", False, "no --advantage-estimator ppo", "the critic would train for nothing"),
)  # fmt: skip
_OF_THE_DATA: tuple[_Rule, ...] = (
    ("n_samples_per_prompt", 1, "no --n-samples-per-prompt, or 1", "an offline prompt has the response that it has"),
    ("prompt_data", None, "no --prompt-data",
     "slime would read it and train on none of it; trajectories come from pear_data"),
)  # fmt: skip


class SlimeSettings(PearConfig):
    """PearConfig's fields and where the trajectories are; in the YAML file each has the prefix ``pear_``.

    Attributes:
        data: scored trajectories, JSONL or Parquet, globs allowed; None with a rollout function of your own.
        data_cache: where the prepared trajectories are kept; default beside the first file.
        tokenizer: for rows of text.
    """

    data: list[str] | None = Field(default=None, min_length=1)
    data_cache: str | None = None
    tokenizer: str | None = None

    @field_validator("data", mode="before")
    @classmethod
    def _one_file_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


def settings(args: argparse.Namespace) -> SlimeSettings:
    """What the ``pear_*`` keys of --custom-config-path say.

    Raises:
        RecipeError: there are none, or an unknown one, or a bad value; names the file and the key. Or what slime does
            not give (see require_supported).
    """
    file = getattr(args, "custom_config_path", None)
    given = {
        name.removeprefix(PREFIX): value for name, value in vars(args).items() if name.startswith(PREFIX)
    }
    if not given:
        raise RecipeError(
            f"--custom-config-path {file}: no key begins with {PREFIX}; put pear_variant, pear_data, ... into that "
            "YAML file (on the command line slime ignores options that it does not know)"
        )
    try:
        found = SlimeSettings(**given)
    except ValidationError as error:
        said = "; ".join(_problem(problem) for problem in error.errors())
        raise RecipeError(f"--custom-config-path {file}: {said}") from error
    require_supported(found, "slime")
    return found


def _problem(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    text = problem["msg"].removeprefix("Value error, ")
    return f"{PREFIX}{key}: {text}" if key else f"{text} (each with the prefix {PREFIX})"


def check_loss_arguments(args: argparse.Namespace) -> None:
    """Refuses arguments of slime that would change the loss behind the user's back.

    Raises:
        RecipeError: which argument, what it must be, and why.
    """
    _check(args, _OF_THE_LOSS)
    if args.context_parallel_size > 1 and getattr(args, "allgather_cp", False):
        raise RecipeError(
            "PEAR needs no --allgather-cp with --context-parallel-size above 1: its suffix sums know slime's zigzag "
            "slices, and that option cuts the packed micro-batch into contiguous ones"
        )
    if not args.vocab_size:
        raise RecipeError(
            "PEAR needs --vocab-size: the columns beyond it are padding and stay out of the softmax"
        )


def check_data_arguments(args: argparse.Namespace) -> None:
    """Refuses arguments of slime under which trajectories would be lost.

    Raises:
        RecipeError: which argument, what it must be, and why.
    """
    _check(args, _OF_THE_DATA)
    if args.rollout_batch_size % args.global_batch_size:
        raise RecipeError(
            f"--rollout-batch-size {args.rollout_batch_size} is no multiple of --global-batch-size "
            f"{args.global_batch_size}: slime would drop the last {args.rollout_batch_size % args.global_batch_size} "
            "trajectories of every rollout; make them equal, or one a multiple of the other"
        )


def _check(args: argparse.Namespace, rules: tuple[_Rule, ...]) -> None:
    for name, needed, option, why in rules:
        given = getattr(args, name, needed)
        if given != needed:
            raise RecipeError(f"PEAR needs {option}: {why} ({name} is {given!r})")
