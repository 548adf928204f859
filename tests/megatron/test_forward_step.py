"""The loss hook on a real tensor-parallel mcore model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pear_megatron import PearConfig
from pear_megatron.data import PackedBatch, Trajectory, collate
from pear_megatron.errors import RecipeError
from pear_megatron.recipe import ModelConfig, ParallelConfig, TrainConfig
from tests.distributed import run_ranks

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=300,
    max_position_embeddings=64,
    qk_layernorm=True,
)
SEQ_LENGTH = 48


def make_trajectories(count: int = 6, seed: int = 0) -> list[Trajectory]:
    generator = torch.Generator().manual_seed(seed)
    trajectories = []
    for i in range(count):
        n = int(torch.randint(5, 22, (), generator=generator))
        mask = torch.rand(n, generator=generator) < 0.7
        mask[0], mask[-1] = False, True
        trajectories.append(
            Trajectory(
                id=str(i),
                input_ids=torch.randint(
                    0, MODEL.vocab_size, (n,), generator=generator, dtype=torch.int32
                ).numpy(),
                loss_mask=mask.numpy(),
                behavior_logprobs=(-5.6 - 0.3 * torch.rand(n, generator=generator)).numpy(),
                reward=1.0,
            )
        )
    return trajectories


def with_topk(batch: PackedBatch, k: int = 3) -> PackedBatch:
    """The batch with a top-k of random tokens."""
    generator = torch.Generator().manual_seed(1)
    chances = torch.rand(*batch.labels.shape, MODEL.vocab_size, generator=generator)
    logprobs, ids = (3 * chances).log_softmax(-1).topk(k)
    return replace(batch, behavior_topk=(ids.int(), logprobs))


def build(tp_size: int, config: ModelConfig = MODEL) -> tuple[Any, Any]:
    from pear_megatron.megatron import cpu

    cpu.enable()
    from megatron.core import parallel_state

    from pear_megatron.megatron.initialize import initialize_weights
    from pear_megatron.megatron.layout import Layout
    from pear_megatron.megatron.model import build_model, wrap_ddp

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp_size)
    layout = Layout(
        rank=torch.distributed.get_rank(), world_size=tp_size, local_rank=0, tp_size=tp_size, pp_size=1,
        dp_size=1, dp_rank=0, device=torch.device("cpu"), is_first_stage=True, is_last_stage=True,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
    )  # fmt: skip
    model = wrap_ddp(build_model(config, layout, TrainConfig(precision="fp32")), ParallelConfig())
    initialize_weights(model, seed=3, vocab_size=config.vocab_size)
    return model, layout


def gradients(model: Any, output: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad_buffer()
    output.backward()
    return {name: p.main_grad.clone() for name, p in model.named_parameters()}


def rank_compares_with_megatron(rank: int, batch: PackedBatch) -> None:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from pear_megatron.megatron.forward_step import PearForwardStep

    model, layout = build(2)
    step = PearForwardStep(PearConfig(variant="none"), vocab_size=MODEL.vocab_size, tp_group=layout.tp_group)
    output, loss_func = step(iter([batch]), model)
    loss, num_tokens, _ = loss_func(output)
    ours = gradients(model, loss)

    logits = model(batch.tokens, batch.position_ids, batch.attention_mask())  # [B, S, V/tp]
    columns = logits.shape[-1]
    real = min(max(MODEL.vocab_size - rank * columns, 0), columns)
    logits = logits.clone()
    logits[..., real:] = -torch.inf  # Megatron's op would take padded columns into the softmax
    labels = batch.labels.where(batch.loss_mask, 0)
    token_loss = vocab_parallel_cross_entropy(
        logits.transpose(0, 1).contiguous(), labels.transpose(0, 1).contiguous()
    )
    theirs_loss = (token_loss.transpose(0, 1) * batch.loss_mask).sum()
    theirs = gradients(model, theirs_loss)

    assert num_tokens == batch.loss_mask.sum()
    torch.testing.assert_close(loss, theirs_loss, rtol=1e-6, atol=1e-5)
    assert ours.keys() == theirs.keys()
    assert sum(bool(g.abs().sum() > 0) for g in ours.values()) == len(ours)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)


def test_plain_sft_equals_megatrons_cross_entropy_in_every_gradient() -> None:
    run_ranks(2, rank_compares_with_megatron, collate(make_trajectories(), [[0, 1], [2, 3]], SEQ_LENGTH))


def rank_both_hooks(rank: int, batch: PackedBatch) -> bool:
    from pear_megatron.megatron.forward_step import PearForwardStep, supports_output_processor

    model, layout = build(2)
    if not supports_output_processor(model):
        return False
    for config in (PearConfig(), PearConfig(base_loss="kl", report_entropy=True)):
        results = []
        for use in (True, False):
            step = PearForwardStep(
                config, vocab_size=MODEL.vocab_size, tp_group=layout.tp_group, use_output_processor=use
            )
            output, loss_func = step(iter([batch]), model)
            loss, num_tokens, report = loss_func(output)
            results.append((loss.detach(), num_tokens, report, gradients(model, loss)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    return True


def test_output_processor_and_logits_paths_agree() -> None:
    batch = with_topk(collate(make_trajectories(), [[0, 1], [2, 3]], SEQ_LENGTH))
    if not run_ranks(2, rank_both_hooks, batch)[0]:
        pytest.skip("this megatron-core has no output_processor (0.19+)")


def rank_loss_of(rank: int, batches: list[PackedBatch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    from pear_megatron.megatron.forward_step import PearForwardStep

    model, layout = build(torch.distributed.get_world_size())
    step = PearForwardStep(PearConfig(), vocab_size=MODEL.vocab_size, tp_group=layout.tp_group)
    losses = []
    for batch in batches:
        output, loss_func = step(iter([batch]), model)
        losses.append(loss_func(output)[0])
    total = torch.stack(losses).sum()
    return total.detach(), gradients(model, total)


def test_packed_equals_unpacked() -> None:
    trajectories = make_trajectories()
    packed = [
        collate(trajectories, [[0, 1], [2, 3]], SEQ_LENGTH),
        collate(trajectories, [[4, 5]], SEQ_LENGTH),
    ]
    alone = [collate(trajectories, [[i]], SEQ_LENGTH) for i in range(6)]
    (packed_loss, packed_grads), (loss, grads) = (
        run_ranks(1, rank_loss_of, batches)[0] for batches in (packed, alone)
    )
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_grads, grads, rtol=1e-4, atol=1e-5)


def test_a_trajectory_does_not_feel_its_neighbours_in_the_row() -> None:
    """Changing trajectory 1 leaves the loss of trajectory 0, in the same row, as it was."""
    trajectories, others = make_trajectories(), make_trajectories(seed=9)
    silent = Trajectory(
        id="silent", input_ids=others[0].input_ids, loss_mask=others[0].loss_mask & False,
        behavior_logprobs=others[0].behavior_logprobs, reward=1.0,
    )  # fmt: skip
    alone = [collate(trajectories, [[0]], SEQ_LENGTH)]
    beside = [collate([trajectories[0], silent], [[0, 1]], SEQ_LENGTH)]
    before = [collate([trajectories[0], silent], [[1, 0]], SEQ_LENGTH)]
    losses = [run_ranks(1, rank_loss_of, batches)[0][0] for batches in (alone, beside, before)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-5, atol=1e-5)


def rank_shares_no_sequence(rank: int, batch: PackedBatch) -> None:
    from megatron.core.utils import get_model_config

    from pear_megatron.megatron.forward_step import PearForwardStep

    model, _ = build(1)
    get_model_config(model).context_parallel_size = 2
    with pytest.raises(RecipeError, match="context_parallel_size 2 and its context-parallel group 1 rank"):
        PearForwardStep(PearConfig(), vocab_size=MODEL.vocab_size)(iter([batch]), model)


def test_a_context_parallel_run_without_its_group_is_refused() -> None:
    run_ranks(1, rank_shares_no_sequence, collate(make_trajectories(), [[0, 1], [2, 3]], SEQ_LENGTH))


def rank_kl_by_torch(rank: int, batch: PackedBatch) -> None:
    """The step's loss and gradient against the model's whole logits and float64 autograd."""
    from pear_megatron.megatron.forward_step import PearForwardStep
    from pear_megatron.ops import reference

    model, _ = build(1)
    config = PearConfig(base_loss="kl", kl_weight=0.7, report_entropy=True)
    step = PearForwardStep(config, vocab_size=MODEL.vocab_size)
    with pytest.raises(RecipeError, match="pear.base_loss: kl needs .*score --top-k K"):
        step(iter([replace(batch, behavior_topk=None)]), model)
    output, loss_func = step(iter([batch]), model)
    loss, _, report = loss_func(output)
    ours = gradients(model, loss)

    logits = model(batch.tokens, batch.position_ids, batch.attention_mask()).flatten(0, 1)
    mask = batch.loss_mask.flatten()
    flat = (batch.labels.flatten(), batch.behavior_logprobs.flatten(), mask, batch.cu_seqlens, config)
    topk = tuple(x.flatten(0, 1) for x in batch.behavior_topk)
    exact = reference.loss_sum(logits, *flat, vocab_size=MODEL.vocab_size, behavior_topk=topk)
    theirs = gradients(model, exact)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    kl = reference.topk_kl(logits, *topk, mask, vocab_size=MODEL.vocab_size)
    entropy = reference.entropy(logits, mask, MODEL.vocab_size)
    for name, values in (("kl", kl), ("pear/entropy", entropy)):
        total, count = report[name].tolist()
        assert total == pytest.approx(float(values.sum()), rel=1e-5)
        assert count == mask.sum()


def test_a_kl_step_equals_float64_on_the_models_logits() -> None:
    run_ranks(1, rank_kl_by_torch, with_topk(collate(make_trajectories(), [[0, 1], [2, 3]], SEQ_LENGTH)))


def packed_models(rank: int) -> dict[str, str]:
    """What the forward step says of models under which packed trajectories would see each other."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from pear_megatron.megatron.forward_step import PearForwardStep

    build(1)

    def said(packed: str = "mask", *, stand_in: str | None = None, **changed: Any) -> str:
        settings: dict[str, Any] = {
            "num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "calculate_per_token_loss": True,
            "use_cpu_initialization": True, "masked_softmax_fusion": False, "persist_layer_norm": False,
            "bias_dropout_fusion": False, "hidden_dropout": 0.0, "attention_dropout": 0.0,
            "gradient_accumulation_fusion": False,
        }  # fmt: skip
        config = TransformerConfig(**settings | changed)
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(),
            vocab_size=384,
            max_sequence_length=64,
            position_embedding_type="rope",
        )
        if stand_in:  # by its name: the package needs a GPU
            attention = model.decoder.layers[0].self_attention
            attention.core_attention = type(stand_in, (torch.nn.Module,), {})()
        batch = collate(make_trajectories(), [[0, 1], [2, 3]], SEQ_LENGTH)
        step = PearForwardStep(PearConfig(variant="none"), vocab_size=300, packed_attention=packed)
        try:
            step(iter([batch]), model)
        except RecipeError as error:
            return str(error)
        return "taken"

    return {
        "local": said(),
        "window": said(window_size=(8, 0)),
        "fused": said(masked_softmax_fusion=True, bf16=True, params_dtype=torch.bfloat16),
        "transformer engine": said(stand_in="TEDotProductAttention"),
        "mamba": said(stand_in="MambaMixer"),
        "thd": said("thd"),
    }


def test_attention_under_which_packed_trajectories_see_each_other_is_refused() -> None:
    (said,) = run_ranks(1, packed_models)
    assert said["local"] == "taken"
    for name, reason in (
        ("window", "window_size (8, 0)"),
        ("fused", "--no-masked-softmax-fusion"),
        ("transformer engine", "packed_attention='thd'"),
    ):
        assert "the mask between packed trajectories would not be looked at" in said[name]
        assert reason in said[name]
    assert "which takes no packed rows (THD)" in said["thd"]
    assert "the model has Mamba layers" in said["mamba"]


def test_arguments_of_another_kind_are_named() -> None:
    from pear_megatron.megatron.forward_step import PearForwardStep

    with pytest.raises(ValueError, match="packed_attention must be 'mask' or 'thd', got 'Mask'"):
        PearForwardStep(PearConfig(), vocab_size=300, packed_attention="Mask")
    with pytest.raises(TypeError, match="vocab_size must be the model's number of real tokens, got None"):
        PearForwardStep(PearConfig(), vocab_size=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"pass PearConfig\(\*\*config\)"):
        PearForwardStep({"variant": "token"}, vocab_size=300)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must yield PackedBatch.*got dict"):
        PearForwardStep(PearConfig(), vocab_size=300)(iter([{"tokens": 1}]), None)  # type: ignore[list-item]


def gathered_logits(rank: int) -> str:
    from pear_megatron.megatron.forward_step import PearForwardStep

    model, _ = build(2)
    from pear_megatron.megatron.model import unwrap

    unwrap(model).parallel_output = False
    batch = collate(make_trajectories(), [[0, 1], [2, 3]], SEQ_LENGTH)
    with pytest.raises(RecipeError, match="the model gathers its logits"):
        PearForwardStep(PearConfig(), vocab_size=300)(iter([batch]), model)
    return "refused"


def test_a_model_that_gathers_its_logits_is_refused() -> None:
    assert run_ranks(2, gathered_logits) == ["refused", "refused"]
