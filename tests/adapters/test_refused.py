"""Settings that another loop has no logits or no column for are refused there, and the others pass."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest

from pear_megatron import PearConfig
from pear_megatron.adapters import megatron_lm
from pear_megatron.adapters.slime.settings import settings
from pear_megatron.adapters.verl.loss import PearSFTLoss
from pear_megatron.errors import RecipeError
from pear_megatron.loss import require_supported

COLUMNS = [({"base_loss": "kl"}, "base_loss: kl"), ({"ratio": "reference"}, "ratio: reference")]
LOGITS = [
    ({"report_entropy": True}, "report_entropy: true"),
    ({"entropy_power": 0.5, "report_entropy": True}, "report_entropy: true .*and no entropy_power: 0.5"),
]


def slime(**options: Any) -> None:
    given = {f"pear_{name}": value for name, value in options.items()}
    settings(argparse.Namespace(custom_config_path="pear.yaml", **{"pear_variant": "token", **given}))


LOOPS: list[tuple[str, Callable[..., Any]]] = [
    ("verl", lambda **options: PearSFTLoss(PearConfig(**options))),
    ("slime", slime),
    ("NeMo-RL", lambda **options: require_supported(PearConfig(**options), "NeMo-RL")),
]


@pytest.mark.parametrize(("where", "start"), LOOPS)
@pytest.mark.parametrize(("options", "said"), COLUMNS + LOGITS)
def test_a_loss_without_logits_refuses_them(
    where: str, start: Callable[..., Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(
        RecipeError, match=f"PEAR in {where} has no {said} .*; leave that setting out, or train"
    ):
        start(**options)
    start(variant="block")


def test_where_the_loss_sees_logits_entropies_pass() -> None:
    for options, said in COLUMNS:
        with pytest.raises(RecipeError, match=said):
            require_supported(PearConfig(**options), "Megatron-LM's loop", entropies=True)
    for options, _ in LOGITS:
        require_supported(PearConfig(**options), "Megatron-LM's loop", entropies=True)


def test_megatrons_arguments_hold_every_setting() -> None:
    """A flag that is on or off, and a number that may be left out, among them."""
    parser = megatron_lm.add_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--pear-data", "x", "--pear-report-entropy", "--pear-negative-floor", "2"])
    config = megatron_lm.pear_config(args)
    assert (config.report_entropy, config.negative_floor) == (True, 2.0)
    args = parser.parse_args(["--pear-data", "x", "--no-pear-report-entropy"])
    assert megatron_lm.pear_config(args) == PearConfig()
