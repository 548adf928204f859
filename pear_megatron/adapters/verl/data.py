"""PearDataset: scored trajectories for verl's ``data.custom_cls``; needs no verl to import."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pear_megatron.adapters.offline_data import open_trajectories
from pear_megatron.data import DataConfig
from pear_megatron.data.columns import REFERENCE, Columns, Need
from pear_megatron.errors import RecipeError

# Keys of data.pear: how rows become trajectories (DataConfig), and whether they must have been scored.
_OF_DATA = ("overlong", "truncated", "multi_turn", "chat_template", "cache_dir")
_SETTINGS = (*_OF_DATA, "needs_logprobs", REFERENCE)
# verl's own settings of its dataset that this one would silently not follow, and what they must be.
_FIXED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("truncation", ("error",), "a cut trajectory has lost its suffix, so that its weights would be another's; to leave "
     "long ones out, +data.pear.overlong=drop"),
    ("messages_key", ("messages",), "the column is called messages in scored trajectories"),
    ("tools_key", ("tools",), "the column is called tools in scored trajectories"),
    ("enable_thinking_default", (None, "none"), "give it to the template: "
     "+data.apply_chat_template_kwargs.enable_thinking"),
)  # fmt: skip


class PearDataset(Dataset):  # type: ignore[type-arg]
    """Scored trajectories (JSONL or Parquet, docs/data.md) as verl's SFT trainer reads them.

    Every rank makes one at the same time; rank 0 prepares the files. verl calls it with keywords.

    Args:
        parquet_files: the files, globs allowed.
        tokenizer: verl's; its ``name_or_path`` tokenises rows of text, and must have made the ids of the others.
        config: verl's ``data`` section; its key ``pear`` may hold ``overlong``, ``truncated``, ``multi_turn``,
            ``chat_template``, ``cache_dir`` (see DataConfig), ``needs_logprobs`` (False for plain SFT) and
            ``reference_logprobs``: ``required``, ``if_there`` or, by default, ``no``.
        processor: not used.
        max_samples: take the first so many; -1 = all.

    Raises:
        DataError: what is wrong with the files, by file and line.
        RecipeError: a setting that is unknown, or that the dataset does not follow.
    """

    def __init__(
        self, parquet_files: Any, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1
    ) -> None:
        files = [parquet_files] if isinstance(parquet_files, str) else list(parquet_files)
        for name, allowed, why in _FIXED:
            if config.get(name, allowed[0]) not in allowed:
                raise RecipeError(f"data.{name}={config.get(name)}: PEAR's dataset needs {allowed[0]}: {why}")
        settings = dict(_plain(config.get("pear") or {}))
        if unknown := sorted(set(settings) - set(_SETTINGS)):
            raise RecipeError(f"data.pear has no {', '.join(unknown)}; it has {', '.join(_SETTINGS)}")
        needs_logprobs = bool(settings.pop("needs_logprobs", True))
        reference = settings.pop(REFERENCE, "no")
        if reference not in get_args(Need):
            raise RecipeError(f"data.pear.{REFERENCE}={reference}: it is one of {', '.join(get_args(Need))}")
        self.trajectories = open_trajectories(
            DataConfig(
                train=files,
                seq_length=config.max_length
                - 1,  # verl counts tokens, and a trajectory of n takes n - 1 positions
                tokenizer=tokenizer.name_or_path,
                chat_template_kwargs=_plain(config.get("apply_chat_template_kwargs") or {}),
                **settings,
            ),
            needs_logprobs=needs_logprobs,
            columns=Columns(reference_logprobs=reference),
            vocab_size=len(tokenizer),
        )
        self._length = len(self.trajectories) if max_samples < 0 else min(max_samples, len(self.trajectories))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A trajectory of n tokens: every entry [n], aligned with ``input_ids``."""
        trajectory = self.trajectories[index]
        n = len(trajectory.input_ids)
        row = {
            "input_ids": torch.from_numpy(trajectory.input_ids.astype(np.int64)),
            "position_ids": torch.arange(n),
            "loss_mask": torch.from_numpy(trajectory.loss_mask.astype(np.int64)),
            "behavior_logprobs": torch.tensor(trajectory.behavior_logprobs),
            # Per token, so that it goes through verl's micro-batches as everything else does.
            "reward": torch.full((n,), trajectory.reward),
        }
        if trajectory.token_weights is not None:
            row["token_weights"] = torch.tensor(trajectory.token_weights)
        if trajectory.reference_logprobs is not None:
            row[REFERENCE] = torch.tensor(trajectory.reference_logprobs)
        return row


def _plain(section: Any) -> dict[str, Any]:
    """An OmegaConf section, or a dict, as a dict."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section  # type: ignore
