"""What slime's adapter makes of arguments, trajectories and lengths; needs no slime."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from pear_megatron.adapters import slime
from pear_megatron.adapters.slime.layout import Layout
from pear_megatron.adapters.slime.rollout import samples
from pear_megatron.adapters.slime.settings import check_data_arguments, check_loss_arguments, settings
from pear_megatron.data import DataError
from pear_megatron.errors import RecipeError
from tests.adapters.slime_ranks import ADAPTER, VOCABULARY, write_rows
from tests.distributed import zigzag

SIZE = 6


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data.jsonl", 20)


def arguments(**changed: Any) -> argparse.Namespace:
    """slime's arguments as docs/adapters/slime.md has them, as far as the adapter reads them."""
    usual = {
        "calculate_per_token_loss": True, "compute_advantages_and_returns": False, "vocab_size": VOCABULARY,
        "rollout_data_postprocess_path": f"{ADAPTER}.postprocess_rollout_data",
        "custom_reward_post_process_path": None, "rollout_temperature": 1.0, "rollout_top_p": 1.0,
        "recompute_loss_function": False, "use_critic": False, "allgather_cp": False, "context_parallel_size": 1,
        "n_samples_per_prompt": 1, "prompt_data": None, "rollout_batch_size": SIZE, "global_batch_size": SIZE,
        "use_dynamic_batch_size": True, "max_tokens_per_gpu": 64, "seq_length": 4096, "rollout_seed": 42,
        "num_rollout": 10, "start_rollout_id": 0, "custom_config_path": "pear.yaml", "pear_variant": "token",
    }  # fmt: skip
    return argparse.Namespace(**{**usual, **changed})


def test_the_keys_of_the_yaml_file_are_the_loss() -> None:
    config = settings(arguments(pear_variant="block", pear_block_size=8, pear_log_ratio_clip=[-0.1, 0.2]))
    assert (config.variant, config.block_size, config.log_ratio_clip) == ("block", 8, (-0.1, 0.2))


@pytest.mark.parametrize(
    ("pear", "said"),
    [
        (
            {"pear_varaint": "token"},
            r"pear.yaml: unknown key 'varaint'; did you mean 'variant'.*prefix pear_",
        ),
        ({"pear_gamma": 2.0}, r"pear.yaml: pear_gamma: Input should be less than or equal to 1"),
        ({"pear_variant": "tokens"}, r"pear_variant: Input should be 'token'"),
        ({"pear_data": []}, r"pear_data: "),
    ],
)
def test_keys_that_are_not_pears_are_named(pear: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        settings(arguments(**pear))


def test_options_that_slime_ignored_do_not_pass_silently() -> None:
    args = arguments()
    del args.pear_variant
    with pytest.raises(RecipeError, match="no key begins with pear_; .* slime ignores options"):
        settings(args)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"calculate_per_token_loss": False}, "needs --calculate-per-token-loss: without it slime divides by"),
        ({"compute_advantages_and_returns": True}, "needs --disable-compute-advantages-and-returns"),
        ({"rollout_data_postprocess_path": None}, "needs --rollout-data-postprocess-path pear_megatron.adapters.slime"),
        ({"custom_reward_post_process_path": "my.rewards"}, "no --custom-reward-post-process-path: .*'my.rewards'"),
        ({"rollout_temperature": 0.7}, r"rollout_temperature is 0.7"),
        ({"rollout_top_p": 0.9}, r"rollout_top_p is 0.9"),
        ({"recompute_loss_function": True}, "no --recompute-loss-function"),
        ({"use_critic": True}, "no --advantage-estimator ppo"),
        ({"allgather_cp": True, "context_parallel_size": 2}, "no --allgather-cp with --context-parallel-size above 1"),
        ({"vocab_size": None}, "needs --vocab-size"),
    ],
)  # fmt: skip
def test_arguments_that_would_spoil_the_loss_are_refused(changed: dict[str, Any], said: str) -> None:
    check_loss_arguments(arguments())
    with pytest.raises(RecipeError, match=said):
        check_loss_arguments(arguments(**changed))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"n_samples_per_prompt": 8}, "no --n-samples-per-prompt, or 1"),
        ({"prompt_data": "prompts.jsonl"}, "no --prompt-data: slime would read it and train on none of it"),
        ({"global_batch_size": 4}, "slime would drop the last 2 trajectories of every rollout"),
    ],
)
def test_arguments_that_would_lose_trajectories_are_refused(changed: dict[str, Any], said: str) -> None:
    check_data_arguments(arguments())
    with pytest.raises(RecipeError, match=said):
        check_data_arguments(arguments(**changed))


def ids(data: Path, rollout: int, **changed: Any) -> list[str]:
    given = samples(arguments(pear_data=str(data), **changed), rollout)
    return [sample["metadata"]["id"] for sample in given]


def test_every_epoch_shows_every_trajectory_once_in_an_order_of_its_own(data: Path) -> None:
    seen = [name for rollout in range(10) for name in ids(data, rollout)]
    epochs = [seen[:20], seen[20:40], seen[40:60]]
    assert all(sorted(epoch) == sorted(f"row-{i}" for i in range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_rollout_depends_on_seed_and_number_alone(data: Path) -> None:
    assert ids(data, 7) == ids(data, 7) != ids(data, 7, rollout_seed=43)


def test_a_sample_is_its_row(data: Path) -> None:
    rows = {row["id"]: row for row in map(json.loads, data.read_text().splitlines())}
    for sample in samples(arguments(pear_data=str(data)), 3):
        row, response = rows[sample["metadata"]["id"]], sample["response_length"]
        assert sample["tokens"] == row["input_ids"]
        assert sample["loss_mask"] == row["loss_mask"][-response:]
        assert sample["loss_mask"][0] == 1
        assert not any(row["loss_mask"][:-response])
        assert sample["rollout_log_probs"] == pytest.approx(row["behavior_logprobs"][-response:])
        assert sample["reward"] == row["reward"]
    assert sample["index"] == 4 * SIZE - 1


def test_it_says_how_many_epochs_are_asked_for(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="pear_megatron"):
        ids(data, 0)
    assert "an epoch is 3.333 rollouts; 3 epochs are asked for" in caplog.text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"max_tokens_per_gpu": 16}, "--max-tokens-per-gpu x --context-parallel-size"),
        ({"use_dynamic_batch_size": False, "seq_length": 16}, "over-long for --seq-length"),
    ],
)
def test_trajectories_beyond_the_limit_are_named(changed: dict[str, Any], said: str, data: Path) -> None:
    with pytest.raises(DataError, match=said):
        ids(data, 0, **changed)


def test_factors_of_single_decisions_are_refused(tmp_path: Path) -> None:
    row = {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1], "behavior_logprobs": [0, -1, -1]}
    (tmp_path / "data.jsonl").write_text(json.dumps({**row, "token_weights": [0, 1, 2]}) + "\n")
    with pytest.raises(RecipeError, match="rows have token_weights, and slime carries no number of the kind"):
        ids(tmp_path / "data.jsonl", 0)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"pear_base_loss": "kl"}, "base_loss kl needs behavior_topk_ids, which slime does not carry"),
        ({"pear_ratio": "reference"}, "ratio reference needs reference_logprobs, which slime does not carry"),
        (
            {"pear_negative_floor": 1.0},
            "rows have reference_logprobs, and slime carries no number of the kind",
        ),
    ],
)
def test_losses_of_columns_that_slime_does_not_carry_are_refused(
    keys: dict[str, Any], said: str, tmp_path: Path
) -> None:
    row = {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1], "behavior_logprobs": [0, -1, -1]}
    (tmp_path / "data.jsonl").write_text(json.dumps({**row, "reference_logprobs": [0, -1, -2]}) + "\n")
    with pytest.raises(RecipeError, match=said):
        samples(arguments(pear_data=str(tmp_path / "data.jsonl"), **keys), 0)


def test_rows_without_logprobs_train_plain_sft_alone(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}\n')
    assert samples(arguments(pear_data=str(tmp_path / "data.jsonl"), pear_variant="none"), 0)[0][
        "loss_mask"
    ] == [1, 1]
    with pytest.raises(DataError, match="missing field 'behavior_logprobs'"):
        ids(tmp_path / "data.jsonl", 0)


def test_data_are_asked_for_by_their_key() -> None:
    with pytest.raises(RecipeError, match="pear_data is missing"):
        samples(arguments(), 0)


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_the_layout_is_the_zigzag_of_padded_samples(cp_size: int) -> None:
    total, response = [5, 12, 7, 2], [4, 3, 6, 1]
    multiple = 2 * cp_size if cp_size > 1 else 1
    tokens = [torch.arange(n) + 100 * i for i, n in enumerate(total)]
    following = [torch.cat([t[1:], t[-1:].expand(1 + -len(t) % multiple)]) for t in tokens]
    for rank in range(cp_size):
        layout = Layout.of(total, response, cp_rank=rank, cp_size=cp_size)
        mine = torch.cat(following)
        if cp_size > 1:
            mine = zigzag(mine, layout.cu_seqlens.long(), rank, cp_size)
        torch.testing.assert_close(torch.cat(tokens)[layout.following], mine)
    scored = [
        int(token)
        for rank in range(cp_size)
        for layout in [Layout.of(total, response, cp_rank=rank, cp_size=cp_size)]
        for token in torch.cat(tokens)[layout.following][layout.scoring]
    ]
    assert sorted(scored) == [int(t) for sample, n in zip(tokens, response, strict=True) for t in sample[-n:]]


def rollout_data(**changed: Any) -> dict[str, Any]:
    """What slime's training actor holds of two samples."""
    usual = {
        "rollout_log_probs": [torch.tensor([-1.0, -2.0]), torch.tensor([-1.0])],
        "loss_masks": [torch.tensor([1, 1], dtype=torch.int), torch.tensor([1], dtype=torch.int)],
        "local_raw_reward": [2.0, -0.5], "rewards": [0.0, 0.0], "sample_indices": [6, 7], "num_microbatches": [1],
    }  # fmt: skip
    return {**usual, **changed}


def test_rewards_reach_the_loss_as_the_samples_have_them() -> None:
    held = rollout_data()
    slime.postprocess_rollout_data(arguments(), 1, held)
    assert [reward.tolist() for reward in held["advantages"]] == [[2.0, 2.0], [-0.5]]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rollout_log_probs": None}, "rollout 1: the samples have no rollout_log_probs"),
        ({"local_raw_reward": [1.0, None]}, "rollout 1: the reward of sample 7 is None"),
        ({"local_raw_reward": [float("nan"), 1.0]}, "the reward of sample 6 is nan"),
        ({"loss_masks": [torch.tensor([0, 0]), torch.tensor([1])]}, "sample 6 has no token on its loss mask"),
    ],
)
def test_samples_that_would_spoil_the_loss_are_named(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        slime.postprocess_rollout_data(arguments(), 1, rollout_data(**changed))


def test_the_loss_asks_for_what_carries_the_rewards() -> None:
    with pytest.raises(RecipeError, match="needs --rollout-data-postprocess-path"):
        slime.loss_function(arguments(), {"advantages": None}, torch.zeros(1, 2, 8), None)


def test_evaluations_are_refused() -> None:
    with pytest.raises(RecipeError, match="leave --eval-interval out"):
        slime.generate_rollout(arguments(), 0, None, evaluation=True)
