"""PEAR in NeMo-RL's own SFT loop: python -m pear_megatron.rl.nemo_rl.sft --config RECIPE.yaml [key=value ...]

The recipe is one of NeMo-RL's for SFT with two sections of ours: ``pear:`` (PearConfig) and ``pear_data:``
(DataConfig without seq_length; its tokenizer is policy.tokenizer.name if not given). They take the place of
``data.train`` and ``data.validation``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from pear_megatron.config import PearConfig
from pear_megatron.data import DataConfig, TrajectoryDataset, prepare, require_files
from pear_megatron.data.columns import REFERENCE, Columns, needs_behavior_logprobs, require_supported
from pear_megatron.errors import PearError, RecipeError
from pear_megatron.report import WeightWatch
from pear_megatron.rl.nemo_rl.loss import PearLoss


class NemoRlTrajectories:
    """Our prepared trajectories as a data set of NeMo-RL: items are its ``DatumSpec``.

    Its SFT loop marks what is trained by role. So each run of decisions is a message of the assistant, and each
    run of other tokens one of the user; the behaviour log-probs are a second tensor beside ``token_ids``, and those of
    the reference, where the loss takes them, a third.
    """

    def __init__(self, trajectories: TrajectoryDataset) -> None:
        self.trajectories = trajectories

    def __len__(self) -> int:
        return len(self.trajectories)

    def __getitem__(self, index: int) -> dict[str, Any]:
        trajectory = self.trajectories[index]
        messages, start = [], 0
        for decision, run in groupby(np.asarray(trajectory.loss_mask).tolist()):
            end = start + len(list(run))
            message = {
                "role": "assistant" if decision else "user",
                "content": "",
                "token_ids": torch.tensor(trajectory.input_ids[start:end], dtype=torch.long),
                "behavior_logprobs": torch.tensor(trajectory.behavior_logprobs[start:end]),
            }
            if trajectory.reference_logprobs is not None:
                message[REFERENCE] = torch.tensor(trajectory.reference_logprobs[start:end])
            messages.append(message)
            start = end
        return {
            "message_log": messages,
            "length": start,
            "loss_multiplier": 1.0,
            "extra_env_info": {"reward": trajectory.reward},
            "idx": index,
            "task_name": "pear",
        }


class _Loader:
    """NeMo-RL's data loader, which remembers the batch that its loop is at."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.batch: Any = None

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self.batch = batch
            yield batch

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _Policy:
    """NeMo-RL's policy, whose ``train`` also gets what its loop leaves out of a batch, and warns of its weights."""

    def __init__(
        self, policy: Any, loader: _Loader, pad_token_id: int, divisible_by: int, config: PearConfig
    ) -> None:
        self._policy, self._loader = policy, loader
        self._pad_token_id, self._divisible_by = pad_token_id, divisible_by
        self._watch, self._steps = WeightWatch(config), 0

    def train(self, data: Any, loss_fn: Any, **options: Any) -> Any:
        """``Policy.train`` with ``reward`` [B] and the rows' log-probs, [B, S] each, in ``data``."""
        from nemo_rl.data.llm_message_utils import batched_message_log_to_flat_message

        batch = self._loader.batch
        flat, _ = batched_message_log_to_flat_message(
            batch["message_log"],
            pad_value_dict={"token_ids": self._pad_token_id},
            make_sequence_length_divisible_by=self._divisible_by,
        )
        if not torch.equal(flat["token_ids"], data["input_ids"]):
            raise RuntimeError("NeMo-RL's SFT loop arranges a batch in a way this runner does not know")
        data["behavior_logprobs"] = flat["behavior_logprobs"]
        if REFERENCE in flat:
            data[REFERENCE] = flat[REFERENCE]
        data["reward"] = torch.tensor([info["reward"] for info in batch["extra_env_info"]])
        results = self._policy.train(data, loss_fn, **options)
        # Each micro-batch's metrics are its share of the global batch's means.
        means = {key: float(np.sum(values)) for key, values in results["all_mb_metrics"].items()}
        self._steps += 1
        self._watch({"step": self._steps, "decisions": means["num_unmasked_tokens"], **means})
        return results

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)


def load(recipe: str, overrides: list[str]) -> tuple[Any, PearConfig, DataConfig]:
    """NeMo-RL's MasterConfig of the recipe, and our two sections.

    Raises:
        RecipeError: a section of ours is missing or wrong, or the recipe asks for what this runner does not do.
    """
    from nemo_rl.algorithms.sft import MasterConfig
    from nemo_rl.utils.config import load_config, parse_hydra_overrides, register_omegaconf_resolvers
    from omegaconf import OmegaConf

    register_omegaconf_resolvers()
    values: Any = OmegaConf.to_container(parse_hydra_overrides(load_config(recipe), overrides), resolve=True)
    for section in ("pear", "pear_data"):
        if not isinstance(values.get(section), dict):
            raise RecipeError(f"{recipe} has no section {section}:; see {__name__}")
    pear, data = values.pop("pear"), values.pop("pear_data")
    if values["sft"].get("only_unmask_final"):
        raise RecipeError(
            f"{recipe}: sft.only_unmask_final would hide decisions; the data's loss_mask says what is trained"
        )
    # Nothing is validated: a validation loss says nothing about a start for RL.
    values["sft"].update(val_period=0, val_at_start=False, val_at_end=False)
    values["checkpointing"]["metric_name"] = None
    policy = values["policy"]
    data = (
        {"tokenizer": policy["tokenizer"]["name"]}
        | data
        | {"seq_length": policy["max_total_sequence_length"] - 1}
    )
    try:
        trajectories = DataConfig(**data)
        require_files(trajectories)
        return MasterConfig(**values), PearConfig(**pear), trajectories
    except ValidationError as error:
        raise RecipeError(f"{recipe}: {error}") from error


def run(recipe: str, overrides: list[str]) -> None:
    """Trains; what NeMo-RL's examples/run_sft.py does, with our data and loss.

    Raises:
        PearError: the recipe or the data are wrong.
    """
    from nemo_rl.algorithms.sft import setup, sft_train
    from nemo_rl.algorithms.utils import get_tokenizer
    from nemo_rl.distributed.virtual_cluster import init_ray
    from nemo_rl.utils.logger import get_next_experiment_dir

    config, pear, data = load(recipe, overrides)
    tokenizer = get_tokenizer(config.policy["tokenizer"])
    require_supported(pear, "NeMo-RL's loop", carries=(REFERENCE,))
    cache = prepare(
        data,
        require_behavior_logprobs=needs_behavior_logprobs(pear),
        columns=Columns.of(pear),
        vocab_size=len(tokenizer),
    )
    trajectories = TrajectoryDataset.open(cache)
    if weighted := trajectories.meta["counts"].get("token_weights"):
        raise RecipeError(
            f"pear_data: {weighted} rows have token_weights, which NeMo-RL's loop does not know; take them out, or "
            "train with python -m pear_megatron.train"
        )
    config.logger["log_dir"] = get_next_experiment_dir(config.logger["log_dir"])
    init_ray()
    policy, _, loader, _, nll, logger, checkpointer, state, config = setup(
        config, tokenizer, NemoRlTrajectories(trajectories), None
    )
    batches = _Loader(loader)
    divisible_by = config.policy["make_sequence_length_divisible_by"]
    with_behavior = _Policy(policy, batches, tokenizer.pad_token_id, divisible_by, pear)
    loss = PearLoss(pear, use_fused_linear_logprobs=nll.use_fused_linear_logprobs)
    with checkpointer:
        sft_train(with_behavior, batches, None, tokenizer, loss, config, logger, checkpointer, state)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pear_megatron.rl.nemo_rl.sft",
        description="PEAR in NeMo-RL's SFT loop, in NeMo-RL's environment.",
        epilog="Example: uv run python -m pear_megatron.rl.nemo_rl.sft --config sft.yaml pear.variant=none",
    )
    parser.add_argument(
        "--config", required=True, help="a NeMo-RL SFT recipe with sections pear: and pear_data:"
    )
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_args()
    try:
        run(arguments.config, arguments.overrides)
    except PearError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
