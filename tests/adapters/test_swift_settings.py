"""PEAR's options beside ``megatron sft``'s, and which of its own are refused; needs no ms-swift."""

from __future__ import annotations

import json
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

import pytest

from pear_megatron import PearConfig
from pear_megatron.adapters.swift import settings
from pear_megatron.errors import CheckpointError, RecipeError

# What ms-swift 4.6.0 has them at where they are not given, as far as they are looked at.
OPTIONS: dict[str, Any] = {
    "model": "models/qwen", "model_dir": "models/qwen", "dataset": ["scored.parquet"], "val_dataset": [],
    "packing": True, "padding_free": True, "max_length": 64, "seq_length": 64, "task_type": None,
    "loss_scale": "default", "attention_backend": "flash", "cp_partition_mode": "zigzag", "system": None,
    "bridge_backend": "mcore-bridge", "enable_dft_loss": False, "enable_channel_loss": False, "streaming": False,
    "truncation_strategy": None, "calculate_per_token_loss": None, "mtp_num_layers": None, "cached_dataset": [],
    "split_dataset_ratio": 0.0, "dataset_shuffle": True, "ignore_args_error": False, "is_multimodal": False,
    "finetune": True, "mcore_model": None, "mcore_adapter": None, "adapters": [],
}  # fmt: skip
Arguments: Any = make_dataclass(
    "Arguments",
    [(name, Any, field(default_factory=lambda value=value: value)) for name, value in OPTIONS.items()]
    + settings.option_fields(),
)


def test_every_setting_of_the_loss_is_an_option() -> None:
    assert settings.pear_config(Arguments()) == PearConfig()
    given = Arguments(pear_variant="block", pear_log_ratio_clip=[-0.1, 0.1], pear_negative_floor=0.5)
    wanted = PearConfig(variant="block", log_ratio_clip=(-0.1, 0.1), negative_floor=0.5)
    assert settings.pear_config(given) == wanted


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pear_gamma": 2.0}, "--pear_gamma: Input should be less than or equal to 1"),
        ({"pear_log_ratio_clip": [0.1, 0.3]}, "log_ratio_clip .* does not contain 0.*prefix --pear_"),
        ({"pear_log_ratio_clip": [0.1]}, "--pear_log_ratio_clip.1: Field required"),
    ],
)
def test_a_bad_setting_is_named_as_an_option(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        settings.pear_config(Arguments(**changed))


def test_the_data_are_what_the_options_say() -> None:
    given = Arguments(pear_overlong="drop", pear_cache_dir="cache")
    config = settings.data_config(given, ["held_out.parquet"])
    assert (config.train, config.seq_length, config.tokenizer) == (["held_out.parquet"], 64, "models/qwen")
    assert (config.overlong, config.cache_dir) == ("drop", "cache")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"packing": False}, "--packing False: .* give --packing true"),
        ({"task_type": "seq_cls"}, "--task_type seq_cls: .*leave it out"),
        ({"calculate_per_token_loss": False}, "every micro-batch would count alike"),
        ({"enable_dft_loss": True}, "its DFT is --pear_dft_power 1"),
        ({"enable_channel_loss": True}, "--enable_channel_loss True: the losses of channels"),
        ({"loss_scale": "last_round"}, "--loss_scale last_round: .* token_weights"),
        ({"mtp_num_layers": 1}, "--mtp_num_layers 1"),
        ({"truncation_strategy": "right"}, "lost its suffix.* --pear_overlong drop"),
        ({"attention_backend": "unfused"}, "--attention_backend unfused: .*use flash"),
        ({"cp_partition_mode": "contiguous"}, "--cp_partition_mode contiguous: .*zigzag"),
        ({"bridge_backend": "megatron-bridge"}, "use mcore-bridge"),
        ({"ignore_args_error": True}, "misspelt options"),
        ({"streaming": True}, "--streaming True: it is of ms-swift's own data sets"),
        ({"system": "You are."}, "--system You are.: it is of ms-swift's own data sets and templates"),
        ({"cached_dataset": ["x"]}, r"--cached_dataset \['x'\]"),
        ({"dataset": []}, "--dataset is missing; name the scored trajectories"),
        ({"max_length": None}, "--max_length is missing"),
    ],
)
def test_what_would_train_something_else_is_refused(changed: dict[str, Any], said: str) -> None:
    settings.check_options(Arguments())
    with pytest.raises(RecipeError, match=said):
        settings.check_options(Arguments(**changed))


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(RecipeError, match=r"(?s)--packing False.*--enable_dft_loss.*--streaming"):
        settings.check_options(Arguments(packing=False, enable_dft_loss=True, streaming=True))


def test_rows_are_as_long_as_the_parallel_sizes_ask_for() -> None:
    settings.check_completed(Arguments(), 16)
    with pytest.raises(RecipeError, match="--max_length 64: .*a multiple of 48"):
        settings.check_completed(Arguments(), 48)


def test_models_of_more_than_text_are_refused() -> None:
    with pytest.raises(RecipeError, match="--model models/qwen: .*use a model of text"):
        settings.check_completed(Arguments(is_multimodal=True), 1)


def test_a_captured_graph_is_refused() -> None:
    settings.check_model(object())
    graphs = type("Config", (), {"cuda_graph_impl": "local"})()
    with pytest.raises(RecipeError, match="cuda_graph_impl is 'local'"):
        settings.check_model(graphs)


def test_a_checkpoint_of_another_loss_is_not_gone_on_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = Arguments(pear_variant="block", pear_log_ratio_clip=[-0.1, 0.1])
    (tmp_path / "args.json").write_text(json.dumps(vars(before)))
    going_on = {"mcore_model": str(tmp_path), "finetune": False}
    settings.check_completed(Arguments(**going_on, pear_variant="block", pear_log_ratio_clip=[-0.1, 0.1]), 1)
    settings.check_completed(Arguments(**going_on | {"finetune": True}), 1)
    with pytest.raises(
        CheckpointError, match=r"--pear_variant block, and this run has token; --pear_log_ratio_clip"
    ):
        settings.check_completed(Arguments(**going_on), 1)
    (tmp_path / "args.json").write_text("{}")
    settings.check_completed(Arguments(**going_on), 1)
    assert "does not say which loss it was trained with" in caplog.text
