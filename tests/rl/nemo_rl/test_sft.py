"""PEAR through NeMo-RL's own SFT loop, its configuration, data loader and losses; only the cluster is one process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pear_megatron.config import PearConfig
from pear_megatron.errors import RecipeError
from pear_megatron.megatron import cpu
from tests.megatron.runs import write_trajectories
from tests.rl.nemo_rl.exports import write_export

RECIPE = """
defaults: ${oc.env:NEMO_RL_DIR}/examples/configs/sft.yaml
pear: {variant: token, baseline: sequence_mean}
pear_data: {train: data.jsonl, tokenizer: null}
sft: {max_num_steps: 4}
checkpointing: {enabled: false, checkpoint_dir: checkpoints}
policy:
  model_name: export
  train_global_batch_size: 4
  max_total_sequence_length: 64
  make_sequence_length_divisible_by: 8
  tokenizer: {chat_template: default}
data: {shuffle: false, num_workers: 0}
logger: {log_dir: logs, wandb_enabled: false, tensorboard_enabled: false, monitor_gpus: false}
"""


class OneProcess:
    """In place of NeMo-RL's Policy and its workers: a small model, trained through NeMo-RL's loss preparation."""

    losses: list[dict[str, float]]
    batches: list[Any]

    def __init__(self, **_: Any) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        OneProcess.losses, OneProcess.batches = [], []

    def train(self, data: Any, loss_fn: Any, timer: Any = None) -> dict[str, Any]:
        from nemo_rl.algorithms.loss import prepare_loss_input
        from nemo_rl.algorithms.loss.wrapper import wrap_loss_fn_with_input_preparation

        tokens = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]).sum()
        logits = self.model(data["input_ids"]).logits
        loss, metrics = wrap_loss_fn_with_input_preparation(
            logits, data, data["sample_mask"].sum(), tokens, loss_fn, prepare_loss_input
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        OneProcess.losses.append(metrics)
        OneProcess.batches.append(data)
        return {
            "loss": loss.detach()[None],
            "grad_norm": torch.zeros(1),
            "all_mb_metrics": {name: [value] for name, value in metrics.items()},
        }

    def prepare_for_training(self) -> None: ...

    def print_node_ip_and_gpu_id(self) -> None: ...


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The runner, in a folder with data, a tokenizer and a recipe."""
    root = os.environ.get("NEMO_RL_DIR")
    if not root:
        pytest.skip("NEMO_RL_DIR names no checkout of NeMo-RL")
    cpu.enable()  # NeMo-RL moves token ids with .cuda()
    monkeypatch.syspath_prepend(root)
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("nemo_rl.algorithms.loss", reason="NeMo-RL's own dependencies", exc_type=ImportError)
    sft = pytest.importorskip(
        "nemo_rl.algorithms.sft", reason="NeMo-RL's own dependencies", exc_type=ImportError
    )
    import nemo_rl.distributed.virtual_cluster as cluster

    from pear_megatron.rl.nemo_rl import sft as nemo_rl_sft

    monkeypatch.setattr(sft, "Policy", OneProcess)
    monkeypatch.setattr(sft, "RayVirtualCluster", lambda **_: None)
    monkeypatch.setattr(cluster, "init_ray", lambda: None)
    write_trajectories(tmp_path / "data.jsonl", 16, longest=50)
    write_export(tmp_path / "export")
    _with_a_thousand_tokens(tmp_path / "export" / "tokenizer.json")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    yield nemo_rl_sft
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def _with_a_thousand_tokens(path: Path) -> None:
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"t{i}": i for i in range(len(vocabulary), 1000)}
    path.write_text(json.dumps(tokenizer))


def losses(runner: Any, *overrides: str) -> list[dict[str, float]]:
    runner.run("recipe.yaml", list(overrides))
    return OneProcess.losses


def test_batches_carry_the_data_of_the_files_token_by_token(runner: Any) -> None:
    losses(runner)
    from pear_megatron.data import DataConfig, TrajectoryDataset, prepare

    folder = prepare(DataConfig(train=["data.jsonl"], seq_length=63), vocab_size=1000)
    trajectories = list(TrajectoryDataset.open(folder))
    rows = [(batch, row) for batch in OneProcess.batches for row in range(4)]
    assert len(rows) == len(trajectories) == 16
    for (batch, row), trajectory in zip(rows, trajectories, strict=True):
        n = len(trajectory.input_ids)
        assert batch["input_lengths"][row] == n
        assert batch["input_ids"].shape[1] % 8 == 0
        for key, expected in (
            ("input_ids", trajectory.input_ids),
            ("token_mask", trajectory.loss_mask),
            ("behavior_logprobs", trajectory.behavior_logprobs),
        ):
            assert batch[key][row, :n].tolist() == expected.tolist(), key
            assert key == "input_ids" or not batch[key][row, n:].any()
        assert batch["reward"][row] == trajectory.reward


def write_reference(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    written = [{**row, "reference_logprobs": [v - 0.25 for v in row["behavior_logprobs"]]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in written))


def test_messages_hold_the_reference_log_probs_where_the_loss_takes_them(tmp_path: Path) -> None:
    from pear_megatron.data import DataConfig, TrajectoryDataset, prepare
    from pear_megatron.data.columns import Columns
    from pear_megatron.rl.nemo_rl.sft import NemoRlTrajectories

    write_reference(write_trajectories(tmp_path / "data.jsonl", 4, longest=50))
    config = DataConfig(train=[str(tmp_path / "data.jsonl")], seq_length=63)
    for pear in (PearConfig(ratio="reference"), PearConfig()):
        trajectories = TrajectoryDataset.open(prepare(config, columns=Columns.of(pear), vocab_size=1000))
        for item, trajectory in zip(NemoRlTrajectories(trajectories), trajectories, strict=False):
            found = [message.get("reference_logprobs") for message in item["message_log"]]
            if pear.ratio == "reference":
                assert torch.cat(found).tolist() == trajectory.reference_logprobs.tolist()
            else:
                assert found == [None] * len(found)


def test_batches_carry_the_reference_and_a_kl_is_refused(runner: Any) -> None:
    write_reference(Path("data.jsonl"))
    losses(runner, "+pear.ratio=reference")
    for batch in OneProcess.batches:
        decisions = batch["token_mask"].bool()
        moved = (batch["behavior_logprobs"] - 0.25).where(decisions, 0.0)
        torch.testing.assert_close(batch["reference_logprobs"], moved)
    with pytest.raises(
        RecipeError, match="base_loss kl needs behavior_topk_ids, which NeMo-RL's loop does not"
    ):
        losses(runner, "+pear.base_loss=kl")


def test_training_follows_the_weighted_loss(runner: Any) -> None:
    weighted = losses(runner)
    assert len(weighted) == 4
    assert all(0 < row["pear/effective_sample_size"] <= 1 for row in weighted)
    plain = losses(runner, "pear.variant=none")
    assert weighted[0]["nll"] == pytest.approx(plain[0]["nll"])  # the same model, not yet trained
    assert weighted[1]["nll"] != pytest.approx(plain[1]["nll"])


def test_variant_none_trains_as_nemo_rls_own_loss_does(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        line.replace("-0.5", "1.0") for line in Path("data.jsonl").read_text().splitlines()
    ]  # NLL has no rewards
    Path("data.jsonl").write_text("\n".join(rows) + "\n")
    ours = [row["loss"] for row in losses(runner, "pear.variant=none")]
    from nemo_rl.algorithms.loss import NLLLossFn

    monkeypatch.setattr(runner, "PearLoss", lambda config, **_: NLLLossFn())
    assert ours == pytest.approx([row["loss"] for row in losses(runner, "pear.variant=none")], rel=1e-5)


def test_what_is_wrong_with_the_recipe_is_said_before_ray_starts(runner: Any) -> None:
    with pytest.raises(RecipeError, match="only_unmask_final"):
        runner.run("recipe.yaml", ["sft.only_unmask_final=true"])
    with pytest.raises(RecipeError, match="unknown key 'gama'"):
        runner.run("recipe.yaml", ["+pear.gama=0.9"])
    with pytest.raises(RecipeError, match="has no section pear_data:"):
        runner.run("recipe.yaml", ["~pear_data"])


def test_weights_at_their_floor_are_said(runner: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = losses(runner, "+pear.log_weight_clip=[4.9,5]")
    assert rows[0]["pear/weight_at_floor"] > 0.5
    assert "step 1: 100% of the weights are at their floor" in caplog.text
