"""PearLoss inside NeMo-RL's own code: its losses, its preparation of log-probs, its unpacking. Needs NEMO_RL_DIR."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pear_megatron import PearConfig, pear_loss
from pear_megatron.megatron import cpu
from pear_megatron.rl.nemo_rl.loss import PearLoss

VOCABULARY, LENGTHS, WIDTH = 37, [9, 5, 12, 7], 12
VARIANTS = {
    "token": PearConfig(gamma=0.9, log_ratio_clip=(-0.5, 0.5)),
    "block": PearConfig(variant="block", block_size=3, baseline="sequence_mean"),
    "sequence": PearConfig(variant="sequence"),
    "normalized": PearConfig(normalize="sequence", negative_scale=0.5),
}


@pytest.fixture(scope="module")
def nemo_rl() -> Iterator[Any]:
    """NeMo-RL's losses, in a world of one rank."""
    root = os.environ.get("NEMO_RL_DIR")
    if not root:
        pytest.skip("NEMO_RL_DIR names no checkout of NeMo-RL")
    cpu.enable()  # NeMo-RL moves token ids with .cuda()
    sys.path.insert(0, root)
    try:
        loss = pytest.importorskip(
            "nemo_rl.algorithms.loss", reason="NeMo-RL's own dependencies", exc_type=ImportError
        )
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        yield loss
        torch.distributed.destroy_process_group()
    finally:
        sys.path.remove(root)


@pytest.fixture
def batch(nemo_rl: Any) -> Any:
    """Four trajectories, padded: prompts, a turn in the middle that is no decision, and a sample that is masked out."""
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    rows = len(LENGTHS)
    token_mask = torch.zeros(rows, WIDTH, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        token_mask[row, 2:length] = 1
    token_mask[2, 5:7] = 0
    return BatchedDataDict(
        {
            "input_ids": torch.randint(0, VOCABULARY, (rows, WIDTH)),
            "input_lengths": torch.tensor(LENGTHS),
            "token_mask": token_mask,
            "sample_mask": torch.tensor([1.0, 1.0, 1.0, 0.0]),
            "behavior_logprobs": -2 - torch.rand(rows, WIDTH),
        }
    )


def valid(data: Any) -> tuple[Tensor, Tensor]:
    """Global sequences and decisions, as NeMo-RL's workers count them."""
    return data["sample_mask"].sum(), (data["token_mask"][:, 1:] * data["sample_mask"][:, None]).sum()


def padded(nemo_rl: Any, loss_fn: Any, logits: Tensor, data: Any) -> tuple[Tensor, dict[str, Any]]:
    """As NeMo-RL runs a loss over a padded batch."""
    from nemo_rl.algorithms.loss.wrapper import wrap_loss_fn_with_input_preparation

    return wrap_loss_fn_with_input_preparation(
        logits, data, *valid(data), loss_fn, nemo_rl.prepare_loss_input
    )


def packed(
    nemo_rl: Any, loss_fn: Any, logits: Tensor, data: Any, *, fused: bool
) -> tuple[Tensor, dict[str, Any]]:
    """As NeMo-RL's Megatron worker runs a loss over a pack whose sequences are padded to multiples of four."""
    from nemo_rl.algorithms.loss import utils, wrapper

    lengths = torch.tensor(LENGTHS)
    room = (lengths + 3) // 4 * 4
    pack = torch.cat([logits[i, :n] for i, n in enumerate(room.tolist())])[None]
    starts, padded_starts = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (lengths, room))
    kind, prepare = (
        (wrapper.SequencePackingFusionLossWrapper, utils.prepare_packed_loss_input)
        if fused
        else (wrapper.SequencePackingLossWrapper, utils.prepare_loss_input)
    )
    group = torch.distributed.group.WORLD
    wrapped = kind(loss_fn, prepare, starts, padded_starts, 0, group, None)
    return wrapped(pack, data, *valid(data))


def with_gradient(run: Any, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(len(LENGTHS), WIDTH, VOCABULARY, generator=generator).requires_grad_()
    loss, metrics = run(*arguments[:2], logits, *arguments[2:], **options)
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad, metrics


def test_variant_none_is_nemo_rls_own_nll(nemo_rl: Any, batch: Any) -> None:
    ours = PearLoss(PearConfig(variant="none"))
    for run, options in ((padded, {}), (packed, {"fused": False}), (packed, {"fused": True})):
        loss, gradient, metrics = with_gradient(run, nemo_rl, ours, batch, **options)
        expected, expected_gradient, theirs = with_gradient(
            run, nemo_rl, nemo_rl.NLLLossFn(), batch, **options
        )
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)
        for name, value in theirs.items():
            assert metrics[name] == pytest.approx(value, rel=1e-6), name
        assert metrics["nll"] == pytest.approx(theirs["loss"], rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rewards", [None, [1.0, -1.0, 0.5, 1.0]])
def test_loss_is_pear_loss_on_the_same_logits(
    nemo_rl: Any, batch: Any, variant: str, rewards: list[float] | None
) -> None:
    config, reward = VARIANTS[variant], None if rewards is None else torch.tensor(rewards)
    if reward is not None:
        batch["reward"] = reward
    loss, gradient, metrics = with_gradient(padded, nemo_rl, PearLoss(config), batch)

    def expected(_: Any, __: Any, logits: Tensor) -> tuple[Tensor, dict[str, Any]]:
        mask = (batch["token_mask"] * batch["sample_mask"][:, None]).bool()[:, 1:]
        loss_sum, count, report = pear_loss(
            logits[:, :-1], batch["input_ids"][:, 1:], batch["behavior_logprobs"][:, 1:], mask,
            torch.arange(len(LENGTHS) + 1) * (WIDTH - 1), config, reward=reward,
        )  # fmt: skip
        return loss_sum / count, report

    right, right_gradient, report = with_gradient(expected, None, None)
    torch.testing.assert_close(loss, right, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, right_gradient, rtol=1e-4, atol=1e-7)
    for name, (total, count) in report.items():
        assert metrics[name] == pytest.approx(float(total / count), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fused", [False, True])
def test_nemo_rls_packing_changes_nothing(nemo_rl: Any, batch: Any, variant: str, fused: bool) -> None:
    batch["reward"] = torch.tensor([1.0, -1.0, 0.5, 1.0])
    loss, gradient, metrics = with_gradient(padded, nemo_rl, PearLoss(VARIANTS[variant]), batch)
    packed_loss, packed_gradient, summed = with_gradient(
        packed, nemo_rl, PearLoss(VARIANTS[variant]), batch, fused=fused
    )
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(packed_gradient, gradient, rtol=1e-4, atol=1e-7)
    for name, value in metrics.items():
        assert summed[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_loss_reaches_ray_workers_whole(nemo_rl: Any, batch: Any) -> None:
    import cloudpickle

    loss_fn = PearLoss(VARIANTS["token"])
    sent = cloudpickle.loads(cloudpickle.dumps(loss_fn))
    assert torch.equal(
        with_gradient(padded, nemo_rl, sent, batch)[1], with_gradient(padded, nemo_rl, loss_fn, batch)[1]
    )
    assert sent.input_type is loss_fn.input_type
    assert set(sent.metric_normalizations) == set(with_gradient(padded, nemo_rl, loss_fn, batch)[2])


def test_without_behaviour_logprobs_it_says_what_is_missing(nemo_rl: Any, batch: Any) -> None:
    del batch["behavior_logprobs"]
    with pytest.raises(ValueError, match=r"needs data\['behavior_logprobs'\]"):
        with_gradient(padded, nemo_rl, PearLoss(VARIANTS["token"]), batch)


def test_the_module_imports_without_nemo_rl() -> None:
    code = "import sys, pear_megatron.rl.nemo_rl.loss; assert 'nemo_rl' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
