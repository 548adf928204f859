"""slime's own loop trains with PEAR as the one-rank loss says: its rollout manager, actor, loss dispatch and report.

Needs SLIME_DIR, a checkout of slime, and what slime imports (ray, httpx, wandb, omegaconf, ...).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pear_megatron import PearConfig
from pear_megatron.data import DataConfig, TrajectoryDataset, collate, prepare
from pear_megatron.loss import REPORT_KEYS, pear_loss
from tests.adapters import slime_ranks
from tests.adapters.checkouts import needs_checkout
from tests.distributed import run_ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "slime" / "run_pear_sft.sh"
CHECKOUT = os.environ.get("SLIME_DIR", "")
_NEEDED = ("megatron.training", "ray", "httpx", "wandb", "omegaconf", "transformers")
pytestmark = needs_checkout("slime", "SLIME_DIR", _NEEDED)

BATCHES = "--rollout-batch-size 12 --global-batch-size 6 --num-rollout 3 --use-dynamic-batch-size"
LAYOUTS = {
    "one rank": (1, 1, 1, "--max-tokens-per-gpu 64"),
    "TP 2": (2, 2, 1, "--max-tokens-per-gpu 64"),
    "CP 2": (2, 1, 2, "--max-tokens-per-gpu 40"),
    "DP 2": (2, 1, 1, "--max-tokens-per-gpu 48"),
    "TP 2, CP 2": (4, 2, 2, "--max-tokens-per-gpu 40"),
    "CP 2, DP 2": (4, 1, 2, "--max-tokens-per-gpu 24"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slime_ranks.write_rows(tmp_path_factory.mktemp("data") / "data.jsonl", 20)


def train(data: Path, folder: Path, layout: str, *, number: int = 1, **pear: Any) -> list[dict[str, Any]]:
    """What every rank has of a rollout."""
    world, tp, cp, options = LAYOUTS[layout]
    settings = {"pear_data": str(data), **{f"pear_{name}": value for name, value in pear.items()}}
    given = (CHECKOUT, folder, settings, number, tp, cp, *BATCHES.split(), *options.split())
    return run_ranks(world, slime_ranks.train_a_rollout, *given)


def slices_of_slime(rank: int, checkout: str) -> int:
    """Compares the layout with slime's own slices of samples of many lengths, on every context-parallel rank."""
    slime_ranks.use_checkout(checkout)
    from megatron.core import mpu
    from slime.backends.megatron_utils.cp_utils import slice_log_prob_with_cp, slice_with_cp

    from pear_megatron.adapters.slime.layout import Layout

    compared = 0
    for cp_size in (1, 2, 3, 4):
        mpu.get_context_parallel_world_size = lambda size=cp_size: size
        for cp_rank in range(cp_size):
            mpu.get_context_parallel_rank = lambda place=cp_rank: place
            for total in range(2, 26):
                for response in {1, 2, total // 2, total - 1} & set(range(1, total)):
                    lengths = [total, 9], [response, 4]
                    tokens = [torch.arange(1, n + 1) + 100 * i for i, n in enumerate(lengths[0])]
                    layout = Layout.of(*lengths, cp_rank=cp_rank, cp_size=cp_size)
                    held = torch.cat([slice_with_cp(t, 0) for t in tokens])
                    predicted = torch.cat([slice_with_cp(torch.cat([t[1:], t[-1:]]), 0) for t in tokens])
                    real = predicted > 0
                    assert layout.length == held.numel()
                    assert torch.equal(torch.cat(tokens)[layout.following][real], predicted[real])
                    scored = [
                        slice_log_prob_with_cp(t[-r:].float(), n, r)
                        for t, n, r in zip(tokens, *lengths, strict=True)
                    ]
                    assert torch.equal(
                        torch.cat(tokens)[layout.following][layout.scoring].float(), torch.cat(scored)
                    )
                    compared += 1
    return compared


def test_slimes_slices_are_the_layout() -> None:
    assert run_ranks(1, slices_of_slime, CHECKOUT)[0] > 500


def expected(
    data: Path, indices: list[int], config: PearConfig
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Of a step: the gradients of the one-rank loss over its decisions, and the report's means."""
    dataset = TrajectoryDataset.open(
        prepare(DataConfig(train=[str(data)], seq_length=64), vocab_size=slime_ranks.VOCABULARY)
    )
    length = int(sum(dataset.lengths[i] - 1 for i in indices))
    batch = collate(dataset, [indices], length)
    embedding, output = (w.requires_grad_() for w in slime_ranks.weights())
    logits = embedding[batch.tokens] @ output[: slime_ranks.VOCABULARY].T
    loss, decisions, report = pear_loss(
        logits,
        batch.labels,
        batch.behavior_logprobs,
        batch.loss_mask,
        batch.cu_seqlens,
        config,
        reward=batch.reward,
    )
    (loss / decisions).backward()
    assert embedding.grad is not None
    assert output.grad is not None
    means = {key: float(total / count) for key, (total, count) in report.items()}
    return {"embedding.weight": embedding.grad, "output_layer.weight": output.grad}, means


def steps_of_rollout_1(data: Path) -> list[list[int]]:
    """Rows of the second rollout: places 12 to 23 of the endless order of 20, and so the first epoch's end."""
    names = [json.loads(line)["id"] for line in data.read_text().splitlines()]
    assert len(names) == 20
    orders = [torch.from_numpy(_permutation(20, epoch)) for epoch in (0, 1)]
    places = torch.cat(orders)[12:24].tolist()
    return [places[:6], places[6:]]


def _permutation(count: int, epoch: int) -> Any:
    import numpy as np

    return np.random.Generator(np.random.PCG64([42, epoch])).permutation(count)  # slime's default seed


@pytest.mark.parametrize(
    ("layout", "variant"),
    [*((layout, "token") for layout in LAYOUTS), ("TP 2, CP 2", "sequence"), ("TP 2, CP 2", "none")],
)
def test_gradients_and_report_are_those_of_the_one_rank_loss(
    layout: str, variant: str, data: Path, tmp_path: Path
) -> None:
    tp = LAYOUTS[layout][1]
    pear = {"variant": variant, "negative_scale": 2.0, "log_ratio_clip": [-0.3, 0.3]}
    ranks = train(data, tmp_path, layout, **pear)
    for step, indices in enumerate(steps_of_rollout_1(data)):
        gradients, means = expected(data, indices, PearConfig(**pear))
        for rank in ranks:
            for name, whole in gradients.items():
                mine = whole.chunk(tp)[rank["tp_rank"]] if name == "output_layer.weight" else whole
                torch.testing.assert_close(rank["gradients"][step][name], mine, rtol=1e-5, atol=1e-7)
        reported = ranks[0]["reported"][step]
        assert reported["train/step"] == 2 + step
        for key in REPORT_KEYS:
            assert reported[f"train/{key}"] == pytest.approx(means[key], rel=1e-5, abs=1e-6), key


def test_the_first_rank_says_that_weights_collapse(data: Path, tmp_path: Path) -> None:
    ranks = train(data, tmp_path, "DP 2", number=0, variant="token", log_weight_clip=[-0.001, 0.0005])
    floor, ceiling = (
        ranks[0]["reported"][0][f"train/pear/weight_at_{bound}"] for bound in ("floor", "ceiling")
    )
    assert max(floor, ceiling) > 0.5
    share = f"{100 * max(floor, ceiling):.0f}% of the weights are at their {'floor' if floor > 0.5 else 'ceiling'}"
    assert f"step 1: {share}" in "\n".join(ranks[0]["said"])
    assert not [said for said in ranks[1]["said"] if said.startswith("step")]


def parse_example(rank: int, checkout: str, folder: Path) -> Any:
    """What slime's parser makes of the example script's command line, on a folder that looks like Qwen3-4B's."""
    slime_ranks.use_checkout(checkout)
    from slime.utils import arguments

    from pear_megatron.adapters.slime.settings import check_data_arguments, check_loss_arguments, settings

    sys.argv = ["train_async.py", *(folder / "arguments").read_text().split("\n")[:-1]]
    args = arguments.parse_args()
    check_loss_arguments(args)
    check_data_arguments(args)
    return settings(args), args.tensor_model_parallel_size, args.context_parallel_size, args.vocab_size


def test_the_example_is_what_slime_and_the_adapter_take(tmp_path: Path) -> None:
    qwen3_4b = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 36, "head_dim": 128,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": True, "vocab_size": 151936,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(qwen3_4b))
    ray = tmp_path / "ray"  # keeps what it is asked to submit
    ray.write_text(
        f'#!/bin/sh\ntest "$1" = job || exit 0\nwhile test "$1" != train_async.py; do shift; done; shift\n'
        f'printf "%s\\n" "$@" > {tmp_path}/arguments\n'
    )
    ray.chmod(0o755)
    names = dict.fromkeys(("MODEL", "START", "OUTPUT"), str(tmp_path))
    environment = {
        "SLIME_DIR": CHECKOUT,
        "NUM_ROLLOUT": "10",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        **names,
    }
    subprocess.run([EXAMPLE, "--lr", "5e-6"], env=environment, check=True, timeout=600)
    config, tp, cp, vocab_size = run_ranks(1, parse_example, CHECKOUT, tmp_path)[0]
    assert (config.variant, config.data, tp, cp, vocab_size) == (
        "token",
        ["/data/scored.parquet"],
        2,
        2,
        151936,
    )
