"""train.output_chunk_tokens: the output layer in chunks trains as the whole one does, on real mcore models."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pear_megatron import PearConfig
from pear_megatron.data import PackedBatch, collate
from pear_megatron.errors import RecipeError
from tests.distributed import run_ranks
from tests.megatron.ranks import failures, final_weights, train_runs
from tests.megatron.test_forward_step import (
    MODEL,
    SEQ_LENGTH,
    build,
    gradients,
    make_trajectories,
    with_topk,
)
from tests.megatron.test_layouts import (
    OVERLAP,
    PP,
    TIED,
    TP,
    VPP,
    assert_same_run,
    assert_same_weights,
)

MCORE = tuple(int(part) for part in importlib.metadata.version("megatron-core").split(".")[:2])
needs_output_processor = pytest.mark.skipif(
    MCORE < (0, 19), reason="GPTModel.forward(output_processor=...) is in megatron-core 0.19+"
)
CHUNKS = "train.output_chunk_tokens=50"  # of a micro-batch's 256: the last chunk is short


def make_batches() -> list[PackedBatch]:
    """Two micro-batches of two rows, the second without a decision in one of them."""
    trajectories = make_trajectories()
    batches = [with_topk(collate(trajectories, rows, SEQ_LENGTH)) for rows in ([[0, 1], [2, 3]], [[4], [5]])]
    batches[1].loss_mask[1] = False
    return batches


def rank_chunked_and_whole(rank: int, tied: bool, batches: list[PackedBatch]) -> list[tuple[Any, ...]]:
    """Losses, reports and gradients of two micro-batches, accumulated, by whole logits and by chunks."""
    from pear_megatron.megatron.forward_step import PearForwardStep

    config = MODEL.model_copy(update={"share_embeddings_and_output_weights": tied})
    model, layout = build(torch.distributed.get_world_size(), config)
    answers = []
    kl = PearConfig(base_loss="kl", kl_weight=0.5, kl_tail="bucket", report_entropy=True)
    for pear in (*(PearConfig(variant=v) for v in ("token", "block", "sequence", "none")), kl):
        for chunk_tokens in (None, 1000, 7):
            step = PearForwardStep(
                pear,
                vocab_size=MODEL.vocab_size,
                tp_group=layout.tp_group,
                output_chunk_tokens=chunk_tokens,
            )
            losses, reports = [], []
            for batch in batches:
                output, loss_func = step(iter([batch]), model)
                loss, _, report = loss_func(output)
                losses.append(loss)
                reports.append(report)
            total = torch.stack(losses).sum()
            answers.append((total.detach(), reports, gradients(model, total)))
    return answers


@needs_output_processor
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_every_gradient_is_that_of_whole_logits(tp_size: int, tied: bool) -> None:
    for answers in run_ranks(tp_size, rank_chunked_and_whole, tied, make_batches()):
        for i in range(0, len(answers), 3):
            whole, *chunked = answers[i : i + 3]
            assert sum(bool(g.abs().sum() > 0) for g in whole[2].values()) == len(whole[2])
            for answer in chunked:
                torch.testing.assert_close(answer, whole, rtol=1e-4, atol=1e-5)


@needs_output_processor
def test_runs_are_the_same_on_every_layout(tmp_path: Path, trajectories: Path) -> None:
    """Overlapped data parallelism, whose hook wants the gradient it finds, and tied pipelines among them."""
    (plain, tied), references = (
        [tmp_path / "plain", tmp_path / "tied"],
        train_runs(1, trajectories, {tmp_path / "plain": [], tmp_path / "tied": [TIED]}),
    )
    layouts = {"DP2": OVERLAP, "TP2": [TP], "tied-TP2": [TIED, TP], "tied-PP2": [TIED, PP, VPP]}
    runs = train_runs(2, trajectories, {tmp_path / name: [*extra, CHUNKS] for name, extra in layouts.items()})
    weights = final_weights(plain, tied, *runs)
    for folder, mine in zip(runs, weights[2:], strict=True):
        is_tied = "tied" in folder.name
        assert_same_run(runs[folder], references[tied if is_tied else plain], relative=1e-5)
        assert_same_weights(folder.name, mine, weights[is_tied])


@needs_output_processor
def test_bf16_follows_float32(tmp_path: Path, trajectories: Path) -> None:
    (reference,) = train_runs(1, trajectories, {tmp_path / "fp32": [TIED]}).values()
    (run,) = train_runs(
        2, trajectories, {tmp_path / "bf16": [TIED, TP, CHUNKS, "train.precision=bf16"]}
    ).values()
    keys = ("step", "loss", "nll", "grad_norm")
    run, reference = ([{k: row[k] for k in keys} for row in rows] for rows in (run, reference))
    assert_same_run(run, reference, relative=2e-2)


def rank_sequence_parallel(rank: int, hidden: torch.Tensor, weight: torch.Tensor, batch: PackedBatch) -> Any:
    """Log-probs, this rank's part of the hidden states' gradient, and the weight's, by chunks."""
    from megatron.core import parallel_state

    from pear_megatron.megatron import cpu
    from pear_megatron.megatron.output_chunks import statistics_in_chunks

    cpu.enable()
    ranks = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    hidden = hidden.chunk(ranks)[rank].clone().requires_grad_()  # [s/tp, b, h]
    weight = weight.chunk(ranks)[rank].clone().requires_grad_()
    layer = SimpleNamespace(sequence_parallel=ranks > 1, weight=weight, config=None)
    group = parallel_state.get_tensor_model_parallel_group()
    config = PearConfig(base_loss="kl", report_entropy=True)
    found = statistics_in_chunks(
        hidden, layer, None, batch, config, chunk_tokens=7, vocab_size=300, tp_group=group
    )
    (found.logprob.sum() + found.kl.sum()).backward()
    return torch.stack(found).detach(), hidden.grad, weight.grad


def test_sequence_parallel_ranks_gather_the_hidden_states_and_scatter_their_gradient() -> None:
    batch = with_topk(make_batches()[0])
    hidden, weight = torch.randn(SEQ_LENGTH, 2, 8), torch.randn(512, 8)
    ((logprob, hidden_grad, weight_grad),) = run_ranks(1, rank_sequence_parallel, hidden, weight, batch)
    shards = run_ranks(2, rank_sequence_parallel, hidden, weight, batch)
    for shard in shards:
        torch.testing.assert_close(shard[0], logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([s[1] for s in shards]), hidden_grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([s[2] for s in shards]), weight_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(MCORE >= (0, 19), reason="this megatron-core has output_processor")
def test_a_megatron_core_without_output_processor_is_refused(tmp_path: Path, trajectories: Path) -> None:
    (message,) = failures(1, trajectories, tmp_path / "run", CHUNKS)
    assert message.startswith("RecipeError: train.output_chunk_tokens needs a model whose forward takes")
    assert "megatron-core 0.19" in message


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ({"bias": torch.zeros(3)}, "a bias"),
        ({"gather_output": True}, "gathered output"),
        ({"config": SimpleNamespace(mtp_num_layers=1)}, "mtp_num_layers"),
        ({"config": SimpleNamespace(defer_embedding_wgrad_compute=True)}, "defer_embedding_wgrad_compute"),
        ({"config": SimpleNamespace(use_mup=True)}, "use_mup"),
    ],
)
def test_an_output_layer_that_does_more_than_a_gemm_is_refused(layer: dict[str, Any], said: str) -> None:
    from pear_megatron.megatron.output_chunks import statistics_in_chunks

    output_layer = SimpleNamespace(**{"config": None, "sequence_parallel": False, **layer})
    with pytest.raises(RecipeError, match=f"output layer has .*{said}.*leave train.output_chunk_tokens out"):
        statistics_in_chunks(
            torch.zeros(3, 1, 8),
            output_layer,
            None,
            make_batches()[0],
            PearConfig(),
            chunk_tokens=2,
            vocab_size=9,
        )


def test_chunks_without_the_output_processor_are_refused() -> None:
    from pear_megatron.megatron.forward_step import PearForwardStep

    with pytest.raises(ValueError, match="leave one of the two out"):
        PearForwardStep(PearConfig(), vocab_size=9, use_output_processor=False, output_chunk_tokens=4)
