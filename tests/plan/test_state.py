"""The optimizer's state by kind, type and place, as plan counts it and as Megatron-Core's optimizers hold it."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from pear_megatron.plan.disk import run_disk
from pear_megatron.plan.memory import stage_memory
from tests.distributed import run_ranks
from tests.plan import small

DISTRIBUTED = {"use_distributed_optimizer": True}
AWARE = {"use_precision_aware_optimizer": True}
OFFLOAD = {**AWARE, "optimizer_cpu_offload": True}

newer_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron.core.optimizer.emerging_optimizers") is None,
    reason="megatron-core 0.16 has Muon with other settings, and asks for Transformer Engine's version",
)


def _bytes(sub: Any, *, main_weights: bool, gradients: bool) -> int:
    """What one torch optimizer holds: moments, and the parameters and gradients that are its own."""
    held = [
        x for state in sub.state.values() for key, x in state.items() if key not in ("step", "master_param")
    ]
    parameters = [p for group in sub.param_groups for p in group["params"]]
    held += parameters * main_weights + [p.grad for p in parameters] * gradients
    return sum(x.numel() * x.element_size() for x in held)


def _held(_rank: int, cases: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """(bytes on the GPU, bytes on the host) of the optimizer's state, for each recipe."""
    from megatron.core import parallel_state

    from pear_megatron.megatron.cpu import _Offloaded
    from pear_megatron.megatron.layout import initialize
    from pear_megatron.megatron.model import build_model, wrap_ddp
    from pear_megatron.megatron.optimizer import build_optimizer

    found = []
    for sections in cases:
        recipe = small.recipe(**sections)
        layout = initialize(recipe.model, recipe.parallel, recipe.train)
        model = wrap_ddp(build_model(recipe.model, layout, recipe.train), recipe.parallel)
        optimizer = build_optimizer(recipe, model)
        model.zero_grad_buffer()
        optimizer.step()
        sizes = {False: 0, True: 0}
        for part in optimizer.chained_optimizers:
            for sub in getattr(part.optimizer, "sub_optimizers", [part.optimizer]):
                host = isinstance(sub.param_groups[0]["params"][0], _Offloaded)
                bf16 = recipe.train.precision == "bf16"
                sizes[host] += _bytes(sub, main_weights=bf16, gradients=host)
        found.append((sizes[False], sizes[True]))
        parallel_state.destroy_model_parallel()
    return found


@newer_megatron
def test_state_on_the_host_takes_the_bytes_that_plan_says() -> None:
    cases: list[dict[str, Any]] = [
        {"parallel": DISTRIBUTED, "optimizer": {**OFFLOAD, "optimizer_offload_fraction": fraction}}
        for fraction in (1.0, 0.5)
    ]
    (everything, half) = run_ranks(1, _held, cases)[0]
    (all_planned,), (half_planned,) = (stage_memory(small.recipe(**case), dp_size=1) for case in cases)
    assert everything == (all_planned.optimizer, all_planned.host) == (0, 16 * all_planned.parameters)
    # Megatron-Core offloads whole parameters, until they are enough.
    largest = 1024 * 64
    assert 0 <= half[1] - half_planned.host <= 16 * largest
    assert half_planned.optimizer - half[0] == 12 * (half[1] - half_planned.host) // 16


@newer_megatron
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_muon_has_one_moment_of_the_layers_matrices(precision: str) -> None:
    pytest.importorskip("emerging_optimizers")
    mixture = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
    muon = {"train": {"precision": precision}, "optimizer": {"optimizer": "muon"}}
    cases: list[dict[str, Any]] = [muon, {"model": mixture, **muon}]
    for case, (held, _) in zip(cases, run_ranks(1, _held, cases)[0], strict=True):
        recipe = small.recipe(**case)
        assert stage_memory(recipe, dp_size=1)[0].optimizer == held
        assert run_disk(recipe, 1).optimizer == held


def test_types_of_the_state_and_the_gradients_count() -> None:
    plain, (aware,), (fp8,) = (
        stage_memory(small.recipe(parallel=DISTRIBUTED, **sections), dp_size=4)
        for sections in (
            {},
            {"optimizer": {**AWARE, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "fp8", "main_grads_dtype": "bf16"}},
            {"train": {"fp8": "e4m3", "fp8_recipe": "blockwise"}},
        )
    )  # fmt: skip
    count = plain[0].parameters
    assert (plain[0].optimizer, plain[0].gradients) == (count // 4 * 12, count * 4)
    assert (aware.optimizer, aware.gradients) == (count // 4 * (2 + 2 + 1), count * 2)
    q_k_v_o, mlp = 64 * 64 + 2 * 64 * 32 + 64 * 64, 3 * 64 * 192
    assert fp8.weights - plain[0].weights == 2 * 2 * (q_k_v_o + mlp)


def test_userbuffers_hold_a_micro_batch_for_every_gemm() -> None:
    split = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    plain, overlap = (
        stage_memory(small.recipe(parallel=keys), dp_size=1)[0]
        for keys in (split, {**split, "tp_comm_overlap": True})
    )
    assert overlap.working - plain.working == 12 * 128 * 64 * 2
