"""Memory that plan predicts, against what tensors a real Megatron-Core run holds on the CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from pear_megatron.plan.activations import activations
from pear_megatron.plan.memory import stage_memory
from pear_megatron.plan.remedies import fits, remedies
from pear_megatron.recipe.sections import padded_vocab_size
from tests.distributed import run_ranks
from tests.plan import small


def _optimizer_tensors(optimizer: Any, *, main_weights: bool) -> list[torch.Tensor]:
    """Adam's moments and, in mixed precision, the float32 weights, of every chained optimizer."""
    found = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        for state in inner.state.values():
            found += [state["exp_avg"], state["exp_avg_sq"]]
        if main_weights:
            found += [p for group in inner.param_groups for p in group["params"]]
    return found


def _held(_rank: int, cases: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    """Bytes of weights, gradients and optimizer state on this rank, for each recipe."""
    from megatron.core import parallel_state

    from pear_megatron.megatron.layout import initialize
    from pear_megatron.megatron.lora import add_adapters
    from pear_megatron.megatron.model import build_model, wrap_ddp
    from pear_megatron.megatron.optimizer import build_optimizer

    held = []
    for sections in cases:
        recipe = small.recipe(**sections)
        layout = initialize(recipe.model, recipe.parallel, recipe.train)
        gpt = build_model(recipe.model, layout, recipe.train)
        if recipe.lora is not None:
            add_adapters(gpt, recipe.model, recipe.lora, layout, seed=0)
        model = wrap_ddp(gpt, recipe.parallel)
        optimizer = build_optimizer(recipe, model)
        model.zero_grad_buffer()
        optimizer.step()
        tensors = _optimizer_tensors(optimizer, main_weights=recipe.train.precision == "bf16")
        assert {x.dtype for x in tensors} == {torch.float32}
        held.append(
            (
                sum(p.numel() * p.element_size() for p in model.module.parameters()),
                sum(b.numel_unpadded * b.grad_data.element_size() for b in model.buffers),
                sum(4 * x.numel() for x in tensors),
            )
        )
        parallel_state.destroy_model_parallel()
    return held


def test_weights_gradients_and_optimizer_take_the_bytes_that_plan_says() -> None:
    """TP 2 x DP 2; bfloat16 and float32, optimizer state split over the data-parallel ranks and not; with LoRA."""
    cases = [
        {
            "train": {"precision": precision},
            "parallel": {"tensor_model_parallel_size": 2, "use_distributed_optimizer": distributed},
        }
        for precision in ("bf16", "fp32")
        for distributed in (True, False)
    ]
    lora = {"lora": {"rank": 4}, "checkpoint": {"pretrained": "unused"}}
    cases += [case | lora for case in cases]
    ranks = run_ranks(4, _held, cases)
    for i, sections in enumerate(cases):
        (planned,) = stage_memory(small.recipe(**sections), dp_size=2)
        for weights, gradients, _ in (held[i] for held in ranks):
            assert weights == planned.weights
            assert gradients == planned.gradients
        # Ranks 0 and 2 share a part of the model; the distributed optimizer cuts it at its padded half.
        assert (ranks[0][i][2] + ranks[2][i][2]) / 2 == pytest.approx(planned.optimizer, abs=12)


def _kept_for_backward(_rank: int, sections: dict[str, Any], layers: int) -> int:
    """Bytes of the tensors that autograd keeps, parameters apart."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.packed_seq_params import PackedSeqParams

    from pear_megatron.megatron.attention import layer_spec
    from pear_megatron.megatron.layout import initialize
    from pear_megatron.megatron.model import transformer_config

    torch._dynamo.config.disable = True  # the fused SwiGLU would be compiled
    recipe = small.recipe(**{**sections, "model": {**sections["model"], "num_layers": layers}})
    model = recipe.model
    layout = initialize(model, recipe.parallel, recipe.train)
    config = transformer_config(model, layout, recipe.train)
    config = dataclasses.replace(config, bias_activation_fusion=model.activation == "swiglu")  # as on a GPU
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(recipe.train, normalization="LayerNorm", qk_layernorm=False),
        vocab_size=padded_vocab_size(model.vocab_size, layout.tp_size),
        max_sequence_length=128,
        position_embedding_type=model.position_embedding_type,
    )
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    ids = torch.arange(128)[None]
    rows: dict[str, Any] = {"attention_mask": torch.ones(1, 1, 128, 128, dtype=torch.bool).triu(1)}
    if recipe.train.attention != "mask":
        ends = torch.tensor([0, 48, 128], dtype=torch.int32)
        packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=80, max_seqlen_kv=80)
        rows = {"attention_mask": None, "packed_seq_params": packed}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = gpt(input_ids=ids, position_ids=ids, **rows)
    own = {p.untyped_storage().data_ptr() for p in gpt.parameters()}
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    del output
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own)


def _kept_by_a_layer(_rank: int, sections: dict[str, Any]) -> int:
    return _kept_for_backward(_rank, sections, 3) - _kept_for_backward(_rank, sections, 2)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("attention", ["varlen", "mask"])
@pytest.mark.parametrize(
    "model_keys",
    [{}, {"activation": "gelu", "position_embedding_type": "learned_absolute"}],
    ids=["swiglu-rope", "gelu"],
)
def test_a_layer_keeps_for_backward_what_the_formula_says(
    tp: int, attention: str, model_keys: dict[str, Any]
) -> None:
    sections = {
        "model": {**model_keys, "normalization": "LayerNorm"},
        "train": {"precision": "fp32", "attention": attention},
        "parallel": {"tensor_model_parallel_size": tp},
    }
    recipe = small.recipe(**sections)
    norms = 2 * 2 * 4 * 128  # mean and deviation of each token in both norms
    for kept in run_ranks(tp, _kept_by_a_layer, sections):
        more = kept - norms - activations(recipe).layer
        # Under a mask, the reference, keys and values are repeated for every query head.
        assert more == 0 if attention == "varlen" else 0 <= more <= 2 * 4 * 128 * recipe.model.hidden_size


def test_a_recomputed_layer_keeps_its_input_alone() -> None:
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    sections = {"model": {"normalization": "LayerNorm"}, "train": {"precision": "fp32", **full}}
    (kept,) = run_ranks(1, _kept_by_a_layer, sections)
    assert kept == activations(small.recipe(**sections)).hidden


@pytest.mark.parametrize("modules", [("core_attn",), ("mlp",), ("core_attn", "mlp")], ids="+".join)
def test_recomputed_modules_keep_what_the_formula_says(modules: tuple[str, ...]) -> None:
    again = {"recompute_granularity": "selective", "recompute_modules": modules}
    sections = {"model": {"normalization": "LayerNorm"}, "train": {"precision": "fp32", **again}}
    (kept,) = run_ranks(1, _kept_by_a_layer, sections)
    recipe = small.recipe(**sections)
    norms = 2 * 2 * 4 * 128
    assert kept - norms == pytest.approx(activations(recipe).layer, abs=16)  # the segments' ends


def test_pipeline_stages_hold_one_micro_batch_less_each() -> None:
    recipe = small.recipe(model={"num_layers": 8}, parallel={"pipeline_model_parallel_size": 4})
    stages = stage_memory(recipe, dp_size=1)
    sizes = activations(recipe)
    layers = 2 * sizes.layer
    assert [stage.activations for stage in stages] == [
        4 * (layers + sizes.hidden),
        3 * (layers + sizes.hidden),
        2 * (layers + sizes.hidden),
        layers + 2 * sizes.hidden,
    ]
    assert [stage.logits > 0 for stage in stages] == [False, False, False, True]


def test_interleaved_schedule_holds_the_papers_share_more() -> None:
    model, train = {"num_layers": 16}, {"global_batch_size": 32}
    plain = small.recipe(model=model, train=train, parallel={"pipeline_model_parallel_size": 4})
    virtual = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}
    interleaved = small.recipe(model=model, train=train, parallel=virtual)
    layer = activations(plain).layer
    sent = activations(plain).hidden
    assert stage_memory(plain, 1)[0].activations == 4 * (4 * layer + sent)
    # Korthikanti et al., 4.2.3: L (1 + (p - 1) / (p m)) layers' activations on the first stage.
    assert stage_memory(interleaved, 1)[0].activations == 11 * (2 * layer + sent)
    assert 11 * 2 == 16 * (1 + 3 / (4 * 2))


def test_logits_of_chunks_take_the_chunks_memory_at_any_length() -> None:
    for length in (64, 128):
        recipe = small.recipe(
            data={"train": "unused", "seq_length": length}, train={"output_chunk_tokens": 32}
        )
        assert stage_memory(recipe, dp_size=1)[0].logits == 32 * 1024 * 2  # bfloat16, padded vocabulary
    whole = small.recipe(train={"output_chunk_tokens": 999})
    assert stage_memory(whole, dp_size=1) == stage_memory(small.recipe(), dp_size=1)


def test_logits_that_do_not_fit_are_remedied_by_chunks() -> None:
    recipe = small.recipe(
        model={"vocab_size": 152064, "max_position_embeddings": 1 << 18},
        data={"train": "unused", "seq_length": 1 << 18},
        cluster={"gpus_per_node": 1},
    )
    assert fits(recipe) is None
    assert [str(remedy) for remedy in remedies(recipe)] == ["train.output_chunk_tokens=2048"]
