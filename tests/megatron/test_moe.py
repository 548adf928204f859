"""A mixture of experts trains on every layout as on one process, and its routers' losses count each token once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron.ranks import final_weights, train_runs
from tests.megatron.test_layouts import assert_same_run, assert_same_weights

TP, PP = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
SP = "parallel.sequence_parallel=true"
EP = "parallel.expert_model_parallel_size=2"
WHOLE_EXPERTS = "parallel.expert_tensor_parallel_size=1"
DISTRIBUTED = "parallel.use_distributed_optimizer=true"
OVERLAP = [DISTRIBUTED, "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
MIXTURE = [
    "model.num_moe_experts=4",
    "model.moe_router_topk=2",
    "model.moe_ffn_hidden_size=24",
    "model.qk_layernorm=true",
    "train.moe_aux_loss_coeff=0.05",
    "train.moe_z_loss_coeff=0.01",
]
TWO_RANKS = {
    "EP2": [EP],
    "EP2-distributed": [EP, *OVERLAP],
    "DP2": [],
    "TP2": [TP, SP],
    "TP2xEP2-whole-experts": [TP, SP, EP, WHOLE_EXPERTS],
    "PP2": [PP],
}
FOUR_RANKS = {
    "EP2xDP2": [EP],
    "EP4": ["parallel.expert_model_parallel_size=4"],
    "PP2xEP2": [PP, EP],
    "PP2xVPP2xEP2": [PP, EP, "parallel.virtual_pipeline_model_parallel_size=2"],
    "TP2xEP2": [TP, SP, EP],
    "TP2xEP2xDP2-whole-experts": [TP, SP, EP, WHOLE_EXPERTS, *OVERLAP],
    "TP2xPP2xEP2": [TP, SP, PP, EP, WHOLE_EXPERTS],
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, trajectories: Path) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("mixture") / "one"
    (rows,) = train_runs(1, trajectories, {folder: MIXTURE}).values()
    return folder, rows


@pytest.mark.parametrize(("ranks", "layouts"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["two", "four"])
def test_every_layout_trains_like_one_process(
    tmp_path: Path,
    trajectories: Path,
    one_process: tuple[Path, list[dict[str, Any]]],
    ranks: int,
    layouts: dict[str, list[str]],
) -> None:
    """Losses, the routers' losses, every statistic, gradient norms, and at the end the weights."""
    runs = train_runs(ranks, trajectories, {tmp_path / name: [*MIXTURE, *extra] for name, extra in layouts.items()})
    reference, *others = final_weights(one_process[0], *runs)
    for folder, weights in zip(runs, others, strict=True):
        assert_same_run(runs[folder], one_process[1], relative=1e-5)
        assert_same_weights(folder.name, weights, reference)
