"""Attention over packed segments equals attention under a mask, and makes nothing of the size S x S."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pear_megatron import PearConfig
from pear_megatron.data import PackedBatch, collate
from pear_megatron.errors import RecipeError
from pear_megatron.megatron.attention import attention_path, check_attention, packed_attention
from pear_megatron.megatron.causal_attention import causal_attention, packed_causal_attention
from pear_megatron.recipe import ParallelConfig, TrainConfig
from tests.distributed import run_ranks
from tests.megatron.ranks import failures, final_weights, train_runs
from tests.megatron.test_forward_step import MODEL, build, gradients, make_trajectories
from tests.megatron.test_layouts import PP, TP, VPP, assert_same_run, assert_same_weights

LENGTHS = (5, 1, 30, 0, 12)
SCALE = 0.3


def masked(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[T, H, D] of attention written out, in the inputs' precision."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seen = (segment[:, None] == segment) & torch.ones(len(segment), len(segment)).tril().bool()
    scores = torch.einsum("qhd,khd->hqk", query, key) * SCALE
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, value)


def with_gradients(function: Any, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_every_segment_sees_itself_and_what_is_before_alone(
    groups: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Against attention written out in float64, gradients included; heads in groups, and a segment of no tokens."""
    torch.manual_seed(0)
    shapes = ((sum(LENGTHS), heads, 16) for heads in (6, groups, groups))
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    found = with_gradients(
        lambda *x: packed_causal_attention(*x, cu_seqlens, max(LENGTHS), scale=SCALE), *inputs
    )
    expected = with_gradients(lambda *x: masked(*x, LENGTHS), *(x.double() for x in inputs))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)


def test_rows_of_a_batch_are_apart() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(20, 3, heads, 8) for heads in (4, 2, 2))
    found = causal_attention(query, key, value, scale=SCALE)
    for row in range(3):
        torch.testing.assert_close(
            found[:, row], masked(query[:, row], key[:, row], value[:, row], (20,)), atol=2e-6, rtol=2e-6
        )


def answers(model: Any, layout: Any, batch: PackedBatch, packed: str) -> dict[str, Tensor]:
    """Loss and gradients of a batch of two rows, with a mask or by the segments' ends."""
    from pear_megatron.megatron.forward_step import PearForwardStep

    step = PearForwardStep(
        PearConfig(), vocab_size=MODEL.vocab_size, tp_group=layout.tp_group, packed_attention=packed
    )
    output, loss_function = step(iter([batch]), model)
    loss, num_tokens, _ = loss_function(output)
    return {"loss": loss.detach(), "tokens": num_tokens} | gradients(model, loss)


def rank_answers(rank: int, tp_size: int, options: dict[str, Any]) -> tuple[dict[str, Tensor], ...]:
    model, layout = build(tp_size, MODEL.model_copy(update=options))
    batch = collate(make_trajectories(), [[0, 1], [2, 3, 4]], 64)
    return answers(model, layout, batch, "thd"), answers(model, layout, batch, "mask")


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"position_embedding_type": "learned_absolute", "num_query_groups": 4, "add_qkv_bias": True},
        {"rotary_base": 100, "num_query_groups": 2, "num_attention_heads": 6, "kv_channels": 8},
    ],
    ids=["rope", "learned-positions", "three-heads-a-group"],
)
def test_loss_and_gradients_of_a_model_are_those_under_a_mask(tp_size: int, options: dict[str, Any]) -> None:
    """Two rows of several trajectories in one micro-batch: rope and positions start anew in each of them."""
    for packed, expected in run_ranks(tp_size, rank_answers, tp_size, options):
        assert packed.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(packed[name], value, atol=1e-5, rtol=1e-5, msg=name)


class _Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return made


def rank_largest(rank: int, length: int) -> tuple[int, int]:
    model, layout = build(1, MODEL.model_copy(update={"max_position_embeddings": length}))
    batch = collate(make_trajectories(length // 22), [list(range(length // 22))], length)
    found = []
    for packed in ("thd", "mask"):
        with _Largest() as largest:
            answers(model, layout, batch, packed)
        found.append(largest.elements)
    return found[0], found[1]


def test_nothing_grows_with_the_square_of_the_rows_length() -> None:
    length = 1024
    ((packed, mask),) = run_ranks(1, rank_largest, length)
    assert mask >= length**2
    assert packed == length * 384  # logits


VARLEN, MASK = "train.attention=varlen", "train.attention=mask"
FULL = ["train.recompute_granularity=full", "train.recompute_method=uniform", "train.recompute_num_layers=1"]


@pytest.mark.parametrize("world", [1, 2])
def test_runs_train_as_under_a_mask_on_every_layout(tmp_path: Path, trajectories: Path, world: int) -> None:
    """Losses, statistics, gradient norms and final weights, with rows of a micro-batch put after each other."""
    rows = "train.micro_batch_size=4"
    (reference,) = train_runs(1, trajectories, {tmp_path / "mask": [MASK]}).values()
    runs = {
        1: {
            tmp_path / "auto": [rows],
            tmp_path / "full": [VARLEN, *FULL, rows],
            tmp_path / "selective": [VARLEN, "train.recompute_granularity=selective"],
        },
        2: {
            tmp_path / "tp": [VARLEN, TP, rows],
            tmp_path / "pp": [VARLEN, PP],
            tmp_path / "vpp": [VARLEN, PP, VPP, "train.micro_batch_size=2"],
        },
    }[world]
    for metrics in train_runs(world, trajectories, runs).values():
        assert_same_run(metrics, reference, relative=1e-5)
    expected, *found = final_weights(tmp_path / "mask", *runs)
    for folder, weights in zip(runs, found, strict=True):
        assert_same_weights(folder.name, weights, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may have Transformer Engine")
def test_without_transformer_engine_auto_is_varlen_and_asking_for_it_is_refused() -> None:
    assert [attention_path(TrainConfig(precision=p)) for p in ("bf16", "fp32")] == ["varlen", "varlen"]
    assert attention_path(TrainConfig(attention="mask")) == "mask"
    ways = [packed_attention(TrainConfig(attention=a)) for a in ("auto", "varlen", "mask")]
    assert ways == ["thd", "thd", "mask"]
    with pytest.raises(RecipeError, match=r"needs a GPU and Transformer Engine .*set varlen"):
        attention_path(TrainConfig(attention="transformer_engine"))


def test_transformer_engine_in_float32_is_refused_anywhere() -> None:
    with pytest.raises(RecipeError, match=r"bf16 only .* is fp32; set train.precision=bf16 or .*=varlen"):
        attention_path(TrainConfig(attention="transformer_engine", precision="fp32"))


@pytest.mark.parametrize("attention", ["varlen", "mask"])
def test_layouts_of_transformer_engine_alone_name_the_attention_that_has_them_not(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = TrainConfig(attention=attention)
    with pytest.raises(
        RecipeError, match=f"context_parallel_size 2 needs.*attention here is {attention}: set it"
    ):
        check_attention(ParallelConfig(context_parallel_size=2), train)
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: True
    )  # on CPU ranks there is sequence parallelism
    with pytest.raises(RecipeError, match=f"sequence_parallel True needs.*here is {attention}: leave it out"):
        check_attention(ParallelConfig(sequence_parallel=True, tensor_model_parallel_size=2), train)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may have Transformer Engine")
def test_a_run_that_asks_for_transformer_engine_ends_before_it_starts(
    tmp_path: Path, trajectories: Path
) -> None:
    options = ["train.attention=transformer_engine", "train.precision=bf16"]
    (message,) = failures(1, trajectories, tmp_path / "run", *options)
    assert "train.attention=transformer_engine needs a GPU" in message


def rank_refusals(rank: int) -> list[str]:
    """What the module says to what torch's kernels do not compute."""
    from pear_megatron.megatron import cpu

    cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from pear_megatron.megatron.core_attention import VarlenAttention

    parallel_state.initialize_model_parallel()
    said = []

    def module(**options: Any) -> VarlenAttention:
        config = TransformerConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, **{"attention_dropout": 0.0, **options}
        )
        return VarlenAttention(config, 2, AttnMaskType.causal, "self")

    for options in ({"attention_dropout": 0.1}, {"window_size": (8, 0)}, {"softmax_type": "off-by-one"}):
        try:
            module(**options)
        except RecipeError as error:
            said.append(str(error))
    query = torch.randn(8, 4, 8)
    for qkv_format, mask in (("sbhd", None), ("thd", torch.zeros(1, 1, 8, 8, dtype=torch.bool))):
        cu_seqlens = torch.tensor([0, 8], dtype=torch.int32)
        packed = PackedSeqParams(qkv_format=qkv_format, cu_seqlens_q=cu_seqlens, max_seqlen_q=8)
        try:
            module()(query, query, query, mask, packed_seq_params=packed)
        except ValueError as error:
            said.append(str(error))
    scaled = module(apply_query_key_layer_scaling=True, attention_softmax_in_fp32=True)
    rows = query[:, None]
    causal = torch.ones(1, 1, 8, 8).triu(1).bool()
    torch.testing.assert_close(scaled(rows, rows, rows, None), scaled(rows, rows, rows, causal))
    return said


def test_what_torchs_kernels_do_not_compute_is_refused() -> None:
    (said,) = run_ranks(1, rank_refusals)
    assert [message.split(":")[0] for message in said[:3]] == [
        "attention_dropout 0.1",
        "window_size (8, 0)",
        "softmax_type 'off-by-one'",
    ]
    assert ["got sbhd without one" in said[3], "got thd with one" in said[4]] == [True, True]
