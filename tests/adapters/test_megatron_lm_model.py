"""Which models of Megatron-LM's arguments are described for ``pear-megatron export``, and which are not."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.adapters.test_megatron_lm import MODEL, ON_CPU, ROOT, TRAINING

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="this megatron-core has no megatron.training (0.19 has)",
)

MIXTURE = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 "
# Options beside the tiny model's -> what is said of them; None: nothing, the model is described.
CASES = {
    "": None,
    MIXTURE: None,
    MIXTURE
    + "--moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall --moe-grouped-gemm": None,
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --bf16": None,
    "--untie-embeddings-and-output-weights --attention-dropout 0.1 --init-method-std 0.01": None,
    "--rotary-interleaved": "rotary_interleaved True",
    "--rotary-seq-len-interpolation-factor 4": "--rotary-seq-len-interpolation-factor 4",
    "--rotary-percent 0.5": "--rotary-percent 0.5",
    "--apply-residual-connection-post-layernorm": "apply_residual_connection_post_layernorm True",
    "--no-rope-freq 2": "no_rope_freq",
    "--softmax-type off-by-one": "softmax_type off-by-one",
    "--use-mup": "mup_",
    "--glu-linear-offset 1.0": "glu_linear_offset 1.0",
    "--activation-func-clamp-value 1.0": "activation_func_clamp_value 1.0",
    "--attention-output-gate": "attention_output_gate True",
    "--qk-l2-norm": "qk_l2_norm True",
    MIXTURE + "--moe-router-score-function sigmoid": "moe_router_score_function sigmoid",
    MIXTURE + "--moe-router-topk-scaling-factor 2.5": "moe_router_topk_scaling_factor 2.5",
    MIXTURE + "--moe-router-num-groups 2 --moe-router-group-topk 1": "moe_router_group_topk 1",
    MIXTURE
    + "--moe-apply-probs-on-input --moe-router-topk 1 --moe-router-pre-softmax": "moe_apply_probs_on_input True",
    MIXTURE + "--moe-latent-size 16": "moe_latent_size 16",
    MIXTURE + "--moe-router-load-balancing-type sinkhorn": "moe_router_load_balancing_type sinkhorn",
    MIXTURE + "--moe-expert-capacity-factor 1.0": "moe_expert_capacity_factor 1.0",
}
PROGRAM = """
import json, sys
from pear_megatron.megatron import cpu
cpu.enable_training()
from megatron.training.arguments import parse_args, validate_args
from pear_megatron.adapters import megatron_lm
from pear_megatron.adapters.megatron_lm_model import model_of
base, cases = json.loads(sys.argv[1])
said = []
for case in cases:
    sys.argv = ["pretrain", *base.split(), *case.split()]
    args = parse_args(extra_args_provider=megatron_lm.add_arguments)
    validate_args(args, megatron_lm.DEFAULTS)
    try:
        model_of(args, 1000)
        said.append(None)
    except Exception as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_a_model_that_a_recipe_has_no_words_for_is_named_and_not_described() -> None:
    base = f"{MODEL} {TRAINING} {ON_CPU} --pear-data data.jsonl"
    environment = {"PYTHONPATH": str(ROOT), "CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps([base, list(CASES)])],
        env={**os.environ, **environment, "RANK": "0", "WORLD_SIZE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))
    for case, expected in CASES.items():
        if expected is None:
            assert said[case] is None, case
        else:
            assert expected in (said[case] or "described"), case
