"""A run whose weights leave the sane band says so: once, again when it has doubled, and with settings that help."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from pear_megatron import PearConfig
from pear_megatron.report import WeightWatch
from tests.megatron.runs import REPOSITORY, launch, metrics
from tests.score.jobs import rows_of_ids, run_job, write_jsonl
from tests.score.tiny import without_tokenizer

BASE = REPOSITORY / "recipes" / "sft" / "base.yaml"


@pytest.fixture(scope="module")
def scored_by_itself(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and data whose behaviour policy it is."""
    folder = tmp_path_factory.mktemp("self_scored")
    model = without_tokenizer(tiny_llama, folder / "model")
    write_jsonl(folder / "in.jsonl", rows_of_ids(16, longest=60))
    run_job(folder / "in.jsonl", folder / "scored.parquet", model)
    return model, folder / "scored.parquet"


def train(folder: Path, scored: tuple[Path, Path], *overrides: str) -> tuple[list[dict], str]:
    done = launch(
        1, f"+model.hf={scored[0]}", f"+data.train={scored[1]}", f"+output_dir={folder}", "+data.tokenizer=null",
        "+train.max_steps=8", "train.precision=fp32", "train.global_batch_size=8", "data.seq_length=64",
        "data.packing=false", "optimizer.lr_decay_style=constant", *overrides, config=BASE,
    )  # fmt: skip
    return metrics(folder), done.stderr


@pytest.fixture(scope="module")
def grown(scored_by_itself, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], str]:
    """A run at a high learning rate."""
    return train(tmp_path_factory.mktemp("grown") / "run", scored_by_itself, "optimizer.lr=0.01")


def test_weights_that_grow_are_said(grown):
    rows, said = grown
    assert 0.9 < rows[0]["pear/weight"] <= 1.0  # the behaviour policy itself: the discount alone
    assert rows[-1]["pear/weight"] > 3
    assert "the mean weight is" in said
    assert "lower optimizer.lr" in said


@pytest.mark.parametrize(
    "remedy",
    ["optimizer.lr=1e-6", "+pear.normalize=sequence", "pear.log_weight_clip=[-10,0.7]"],
)
def test_with_what_the_warning_proposes_weights_stay_in_the_band(
    scored_by_itself, tmp_path: Path, remedy: str
):
    settings = ["optimizer.lr=0.01"] if not remedy.startswith("optimizer") else []
    rows, said = train(tmp_path / "run", scored_by_itself, *settings, remedy)
    assert max(row["pear/weight"] for row in rows) < 3
    assert "the mean weight is" not in said


def test_a_clip_as_wide_below_as_above_slows_the_growth(scored_by_itself, grown, tmp_path: Path):
    settings = ("optimizer.lr=0.01", "pear.log_ratio_clip=[-0.08,0.08]")
    rows, _ = train(tmp_path / "run", scored_by_itself, *settings)
    assert rows[-1]["pear/weight"] < 0.5 * grown[0][-1]["pear/weight"]


def seen(step: int, weight: float = 1.0, effective: float = 1.0, floor: float = 0.0) -> dict[str, float]:
    """A step's means, as a loop has them."""
    return {"step": step, "decisions": 9, "pear/weight": weight, "pear/effective_sample_size": effective,
            "pear/weight_at_floor": floor, "pear/weight_at_ceiling": 0.0}  # fmt: skip


def said_at(caplog: pytest.LogCaptureFixture, config: PearConfig, **series: list[float]) -> list[int]:
    """The steps at which a watch speaks."""
    caplog.clear()
    watch = WeightWatch(config)
    count = max(map(len, series.values()))
    weights, effective = series.get("weight", [1.0] * count), series.get("effective", [1.0] * count)
    with caplog.at_level(logging.WARNING, logger="pear_megatron"):
        for step, (weight, share) in enumerate(zip(weights, effective, strict=True), start=1):
            watch(seen(step, weight, share))
    return [int(record.getMessage().split(":")[0].removeprefix("step ")) for record in caplog.records]


def test_it_speaks_once_and_again_only_when_the_mean_has_doubled(caplog):
    constant = [1.0] * 4 + [4.0] * 20
    assert said_at(caplog, PearConfig(), weight=constant) == [7]  # the mean of four steps passes 3
    assert said_at(caplog, PearConfig(), weight=constant + [8.0] * 20) == [7, 27]
    assert said_at(caplog, PearConfig(), weight=[2.9] * 50) == []
    assert said_at(caplog, PearConfig(), weight=[1.0, 1.0, 1.0, 8.0, 1.0]) == []  # one batch is no trend
    assert said_at(caplog, PearConfig(), effective=[0.9] * 4 + [0.05] * 20 + [0.02] * 9) == [8, 28]


def test_it_proposes_nothing_that_the_run_has_or_cannot_have(caplog):
    said_at(caplog, PearConfig(log_ratio_clip=(-0.1, 0.1)), weight=[5.0])
    assert "pear.log_ratio_clip" not in caplog.text
    assert "pear.normalize=sequence" in caplog.text
    said_at(caplog, PearConfig(variant="sequence"), weight=[5.0])
    assert "pear.normalize" not in caplog.text
    assert "pear.log_ratio_clip as wide below as above ([-0.08,0.08])" in caplog.text


def test_too_few_decisions_are_said_with_which_they_are(caplog):
    said_at(caplog, PearConfig(), weight=[0.05], effective=[0.05])
    assert "about 5% of a trajectory's decisions carry its gradient, the last ones" in caplog.text
    said_at(caplog, PearConfig(), weight=[2.0], effective=[0.05])
    assert "those whose continuation the model finds likelier" in caplog.text


def test_plain_sft_has_no_weights_to_watch(caplog):
    assert said_at(caplog, PearConfig(variant="none"), weight=[100.0]) == []


def test_negatives_that_have_stopped_are_said_once(caplog):
    for variant in ("token", "none"):
        caplog.clear()
        watch = WeightWatch(PearConfig(variant=variant, negative_floor=2.0))
        with caplog.at_level(logging.WARNING, logger="pear_megatron"):
            for step, share in enumerate((0.5, 0.95, 1.0), 1):
                watch(seen(step) | {"pear/negative_stopped": share})
        (record,) = caplog.records
        assert record.getMessage().startswith(
            "step 2: 95% of the decisions of negative examples have stopped"
        )
        assert "pear.negative_floor=2 below where they began" in record.getMessage()


def test_few_decisions_of_factors_are_laid_to_the_factors(caplog):
    said_at(caplog, PearConfig(dft_power=1.0), weight=[0.05], effective=[0.05])
    assert "a larger pear.dft_floor" in caplog.text
    assert "sequence_mean" not in caplog.text


def test_collapse_is_said_at_the_first_step_and_every_fifty(caplog):
    watch = WeightWatch(PearConfig())
    with caplog.at_level(logging.WARNING, logger="pear_megatron"):
        for step in range(1, 101):
            watch(seen(step, floor=0.9))
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["step 1", "step 50", "step 100"]
    assert "90% of the weights are at their floor" in caplog.text


def test_a_loop_of_someone_elses_is_watched_by_its_micro_batches(caplog):
    from pear_megatron.loss import REPORT_KEYS
    from pear_megatron.report import ReportWatch

    def report(floor: float) -> dict[str, torch.Tensor]:
        values = {"pear/weight_at_floor": floor * 9} | dict.fromkeys(("loss", "pear/weight"), 9.0)
        return {key: torch.tensor([values.get(key, 4.5), 9.0]) for key in REPORT_KEYS}

    watch = ReportWatch(PearConfig(), interval=4)
    with caplog.at_level(logging.WARNING, logger="pear_megatron"):
        with torch.no_grad():
            for _ in range(4):
                watch(report(1.0))  # an evaluation's
        for floor in (0.5, 0.5, 0.5, 0.6):
            assert not caplog.records
            watch(report(floor))
        (record,) = caplog.records
        assert record.getMessage().startswith("after 1 x 4 of one rank's micro-batches: 53% of the weights")
        for _ in range(4):
            watch(report(0.9))
        assert len(caplog.records) == 1
        plain = ReportWatch(PearConfig(variant="none"), interval=1)
        plain(report(1.0))
    assert len(caplog.records) == 1
