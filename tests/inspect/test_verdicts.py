"""What is wrong is said, with the setting to change; what is right is not accused."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.inspect.scored_rows import Inspect, scored


def test_good_data_are_called_good(look: Inspect) -> None:
    found = look(scored(lambda lb, rng: lb + rng.gauss(-0.02, 0.15)))
    assert found.exit_code == 0
    assert found.titles() == ["weights that tell tokens apart"]


def test_collapse_to_the_floor_names_a_setting_that_helps(look: Inspect) -> None:
    rows = scored(lambda lb, rng: lb - 1 - rng.random(), tokens=400, count=8)
    found = look(rows)
    verdict = found.verdict("collapse to the floor")
    assert verdict["level"] == "warning"
    assert verdict["change"].startswith("pear.")
    assert "the model finds the data unlikely" in found.titles("note")
    overrides = verdict["change"].split(" would leave ")[0].split()
    better = look(rows, *overrides)
    assert found.numbers["statistics"]["all"]["weight_at_floor"] > 0.5
    assert better.numbers["statistics"]["all"]["weight_at_floor"] < 0.05
    assert "collapse to the floor" not in better.titles()


def test_weights_that_see_only_the_place_are_called_so(look: Inspect) -> None:
    found = look(scored(lambda lb, rng: lb - 0.5 - rng.random()))
    verdict = found.verdict("weights that see only the place")
    assert "100% of the ratios are at the low clip" in verdict["text"]
    assert "pear.baseline=sequence_mean" in verdict["change"]


def sometimes_unlikely(lb: float, rng: random.Random) -> float:
    return lb - (2.0 if rng.random() < 0.25 else 0.0)


def test_weights_that_fall_towards_the_end_are_warned_of_and_levelled(look: Inspect) -> None:
    rows = scored(sometimes_unlikely, tokens=40)
    found = look(rows, "pear.baseline=sequence_mean", "pear.log_ratio_clip=[-0.3,0.2]")
    verdict = found.verdict("weights that depend on the place")
    assert verdict["level"] == "warning"
    assert "their end hardly trains" in verdict["text"]
    overrides = verdict["change"].split(" has a content ")[0].split()
    level = look(rows, "pear.baseline=sequence_mean", "pear.log_ratio_clip=[-0.3,0.2]", *overrides)
    assert "weights that depend on the place" not in level.titles()


def test_weights_that_hardly_differ_are_called_so(look: Inspect) -> None:
    rows = scored(sometimes_unlikely, tokens=24)
    found = look(rows, "pear.log_ratio_clip=[-0.02,0.02]")
    verdict = found.verdict("weights that say little")
    assert verdict["level"] == "note"
    assert "pear.gamma=" in verdict["change"]


def test_weights_at_their_ceiling_are_warned_of(look: Inspect) -> None:
    found = look(
        scored(lambda lb, rng: lb - 1 + rng.gauss(0, 1), tokens=300, count=8), "pear.baseline=sequence_mean"
    )
    assert found.numbers["statistics"]["all"]["weight_at_ceiling"] > 0.3
    assert "weights at their ceiling" in found.titles("warning")


@pytest.mark.parametrize(
    ("shift", "said"), [(1, "1 token after"), (-1, "1 token before"), (2, "2 tokens after")]
)
def test_misaligned_log_probs_are_refused_with_a_page(look: Inspect, shift: int, said: str) -> None:
    found = look(scored(lambda lb, rng: lb + rng.gauss(-0.3, 0.4), shift=shift))
    assert found.exit_code == 1
    assert "error: 1 problem in the data:\n  " in found.stderr
    assert f"stand {said} the ones they belong to" in found.stderr
    assert "row-0" in found.stderr
    assert found.numbers["alignment"]["shift"] == shift
    assert found.titles("error") == ["misaligned log-probs"]
    assert said in found.page


def test_on_policy_data_gain_nothing_and_their_weights_will_grow(look: Inspect) -> None:
    rows = scored(lambda lb, rng: lb + rng.gauss(0, 0.005))
    found = look(rows)
    assert found.exit_code == 0
    assert "weights that say little" not in found.titles()  # the verdict on the data has said it
    assert "pear.variant=none" in found.verdict("on-policy data")["change"]
    assert "pear.normalize=sequence" in found.verdict("weights that will grow")["change"]
    bounded = look(rows, "pear.normalize=sequence").verdict("weights that will grow")
    assert "set pear.normalize=sequence" not in bounded["change"]
    assert "weights that will grow" not in look(rows, "pear.variant=none").titles()


@pytest.mark.parametrize(("temperature", "said"), [(0.7, "below 1"), (1.4, "above 1")])
def test_another_temperature_is_suspected(look: Inspect, temperature: float, said: str) -> None:
    found = look(scored(lambda lb, rng: lb * temperature))
    assert f"as if they were taken at a temperature {said}" in found.verdict("wrong temperature")["text"]


def test_log_probs_of_other_tokens_are_suspected(look: Inspect) -> None:
    found = look(scored(lambda lb, rng: -8 + rng.gauss(0, 1)))
    assert "another tokenizer" in found.verdict("log-probs that have nothing to do with each other")["text"]
    assert found.exit_code == 0  # so it is with fresh weights
    rng = random.Random(1)
    rows = scored(lambda lb, rng: -8 + rng.gauss(0, 1))
    for row in rows:
        certain = [
            None if lb is None else (0.0 if rng.random() < 0.9 else -2.0) for lb in row["behavior_logprobs"]
        ]
        row["behavior_logprobs"] = certain
    text = look(rows).verdict("log-probs that have nothing to do with each other")["text"]
    assert re.search(r"a writer as certain as this one \((89|90|91)% of its tokens\)", text)


def test_rewards_of_0_are_counted(look: Inspect) -> None:
    rows = scored(lambda lb, rng: lb + rng.gauss(0, 0.2))
    for row in rows[:12]:
        row["reward"] = 0
    assert "12 of 30 trajectories have reward 0" in look(rows).verdict("rewards of 0")["text"]


def test_half_precision_is_noticed(look: Inspect) -> None:
    import numpy as np

    rows = scored(lambda lb, rng: lb + rng.gauss(0, 0.2))
    for i, row in enumerate(rows):
        noisy = [
            None if lb is None else float(np.float16(lb - i * 0.0137 - 0.001 * t))
            for t, lb in enumerate(row["behavior_logprobs"])
        ]
        row["behavior_logprobs"] = noisy
    assert "float32" in look(rows).verdict("half precision")["change"]


def test_truncated_responses_are_counted(look: Inspect) -> None:
    rows = scored(lambda lb, rng: lb + rng.gauss(0, 0.2))
    for row in rows[:10]:
        row["truncated"] = True
    verdict = look(rows).verdict("truncated responses")
    assert verdict["level"] == "warning"
    assert "10 of 30 rows (33%)" in verdict["text"]


def test_responses_that_look_cut_off_are_noticed(look: Inspect, byte_folder: Path) -> None:
    rows = scored(lambda lb, rng: lb + rng.gauss(0, 0.2))
    for row in rows[:15]:
        row["input_ids"][-1] = 257  # <|im_end|>
    found = look(rows, "--tokenizer", byte_folder)
    assert "50% of the responses do not end" in found.verdict("responses that look cut off")["text"]


def test_plain_sft_has_weights_of_one_and_shows_what_pear_would_give(look: Inspect) -> None:
    found = look(scored(lambda lb, rng: lb + rng.gauss(0, 0.2)), "pear.variant=none")
    assert "plain SFT" in found.titles("note")
    assert found.numbers["statistics"]["all"]["weight"] == 1
    assert any(setting["overrides"] == "pear.variant=token" for setting in found.numbers["alternatives"])


def test_a_sequence_weight_that_saturates_is_told_of_the_mean(look: Inspect) -> None:
    rows = scored(lambda lb, rng: lb - 1 - rng.random(), tokens=400, count=8)
    verdict = look(rows, "pear.variant=sequence").verdict("collapse to the floor")
    assert "a mean does not (pear.sequence_scale=mean)" in verdict["text"]
    assert verdict["change"].startswith("pear.sequence_scale=mean would leave 0% at the floor")
    mean = look(rows, "pear.variant=sequence", "pear.sequence_scale=mean")
    assert "collapse to the floor" not in mean.titles()


def test_negative_examples_are_judged_by_how_far_they_have_fallen(look: Inspect) -> None:
    rows = scored(lambda lb, rng: lb - 3 * (rng.random() < 0.6))
    for row in rows[:10]:
        row["reward"] = -1.0
    open_ended = look(rows)
    verdict = open_ended.verdict("negatives that nothing stops")
    assert "59% of their decisions are more than 2 nats below" in verdict["text"]
    assert verdict["change"].startswith("Set pear.negative_floor=0.5")
    stopped = look(rows, "pear.negative_floor=1")
    assert "negatives that have stopped" in stopped.titles("warning")
    assert 0.5 < stopped.numbers["statistics"]["negative examples"]["negative_stopped"] < 0.7
    assert "pear/negative_stopped" in stopped.page
    assert not [title for title in look(rows, "pear.negative_floor=4").titles() if "negative" in title]
    for row in rows:
        row["reward"] = 1.0
    assert (
        "pear.negative_floor does nothing"
        in look(rows, "pear.negative_floor=4").verdict("no negative examples")["text"]
    )


def test_what_the_page_cannot_show_is_said(look: Inspect) -> None:
    rows = scored(lambda lb, rng: lb + rng.gauss(0, 0.2))
    assert (
        "pear.entropy_power"
        in look(rows, "pear.entropy_power=1").verdict("entropies are not known here")["text"]
    )
    needs = look(rows, "pear.ratio=reference").verdict("no ratios yet")
    assert "--as reference" in needs["change"]
    dft = look(rows, "pear.variant=none", "pear.dft_power=1")
    assert "plain SFT" not in dft.titles()


def test_rows_with_reference_logprobs_show_what_ratios_against_them_give(look: Inspect) -> None:
    rows = scored(lambda lb, rng: lb + rng.gauss(0, 0.2), count=6)
    for row in rows:
        row["reference_logprobs"] = row["policy_logprobs"]
    found = look(rows)
    (reference,) = (s for s in found.numbers["alternatives"] if s["overrides"] == "pear.ratio=reference")
    assert reference["statistics"]["log_ratio"] == 0
    assert found.numbers["statistics"]["all"]["log_ratio"] != 0
    assert look(rows, "pear.ratio=reference").numbers["quantiles"]["log_ratio"]["p50"] == 0


# What brings out verdicts: the policy, the data, the options.
CASES: dict[str, tuple[Callable[[float, random.Random], float], dict[str, Any], list[str]]] = {
    "good": (lambda lb, rng: lb + rng.gauss(-0.02, 0.15), {}, []),
    "floor": (lambda lb, rng: lb - 1 - rng.random(), {"tokens": 400, "count": 8}, []),
    "ceiling": (lambda lb, rng: lb - 1 + rng.gauss(0, 1), {"tokens": 300, "count": 8}, ["pear.baseline=sequence_mean"]),
    "large": (lambda lb, rng: lb + 0.2, {"tokens": 40}, []),
    "shifted": (lambda lb, rng: lb + rng.gauss(-0.3, 0.4), {"shift": 1}, []),
    "on-policy": (lambda lb, rng: lb, {}, []),
    "temperature": (lambda lb, rng: lb * 0.7, {}, []),
    "other tokens": (lambda lb, rng: -8 + rng.gauss(0, 1), {}, []),
    "plain SFT": (lambda lb, rng: lb + rng.gauss(0, 0.2), {}, ["pear.variant=none"]),
}  # fmt: skip


def test_every_verdict_has_a_remedy(look: Inspect) -> None:
    seen = {}
    for policy, changes, options in CASES.values():
        seen |= {
            v["title"]: v["change"] for v in look(scored(policy, **changes), *options).numbers["verdicts"]
        }
    rows = scored()
    rows[0]["truncated"] = True
    seen |= {v["title"]: v["change"] for v in look(rows).numbers["verdicts"]}
    assert len(seen) >= 12, sorted(seen)
    assert [title for title, change in seen.items() if not change.strip()] == []


def test_a_reference_that_is_not_the_model_before_training_is_warned_of(look: Inspect) -> None:
    rows = scored()  # the policy wrote the data itself
    for row in rows:
        row["reference_logprobs"] = [None if lb is None else lb - 0.4 for lb in row["behavior_logprobs"]]
    found = look(rows, "pear.ratio=reference")
    assert (
        "differ from this model's log-probs by 0.40"
        in found.verdict("a reference that is another model")["text"]
    )
    assert "on-policy data" not in found.titles()
    assert "on-policy data" in look(rows).titles()
    for row in rows:
        row["reference_logprobs"] = row["policy_logprobs"]
    assert "a reference that is another model" not in look(rows, "pear.ratio=reference").titles()
