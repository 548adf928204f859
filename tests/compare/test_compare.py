"""A whole comparison: real Megatron-Core, export, evaluation, TRL's GRPO; killed, continued, damaged, extended."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the extra rl")
pytest.importorskip("scipy", reason="needs the extra eval")

from tests.compare import tiny
from tests.compare.tiny import compare
from tests.megatron.runs import launch, metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a comparison that was never stopped."""
    folder = tmp_path_factory.mktemp("compare")
    compare(tiny.write(folder))
    return folder


def test_it_ends_with_numbers_a_page_and_pictures(finished: Path) -> None:
    out, content = finished / "out", tiny.results(finished)
    assert content["seeds"] == [0]
    assert list(content["arms"]) == ["SFT", "token", "no offline phase"]
    for arm in content["arms"].values():
        assert len(arm["rewards"][0]) == 2
        assert {"before/pass@1", "before/pass@2", "after/pass@1", "take_off", "mean_reward"} <= arm[
            "measures"
        ].keys()
    assert list(content["tuning"]) == ["SFT", "token"]
    for arm, tried in content["tuning"].items():
        best = max(tried, key=lambda value: tried[value])
        assert content["arms"][arm]["tuned"] == [f"optimizer.lr={best}"]
    # Or the tests below compare nothing.
    assert 0 < content["arms"]["SFT"]["measures"]["after/pass@1"]["mean"] < 1
    assert len({str(arm["rewards"]) for arm in content["arms"].values()}) > 1
    assert "no offline phase" in (out / "index.html").read_text()
    for name in ("curves.png", "seeds.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    assert not (out / "seed0" / "no-offline-phase" / "run").exists()


def test_finished_cells_keep_their_models_and_tuning_keeps_numbers(finished: Path) -> None:
    out = finished / "out"
    for cell in (out / "seed0").iterdir():
        for model in ("export", "rl/final"):
            assert (cell / model / "model.safetensors").is_file()
    assert not [path for path in out.glob("*/*/**/checkpoints") if "prepared" not in path.parts]
    assert not list((out / "tune").rglob("*.safetensors"))
    assert len(list((out / "tune").rglob("metrics.jsonl"))) == 8  # two arms, two values, two phases


def test_layouts_of_two_ranks_and_one_process_see_the_same_trajectories(
    finished: Path, tmp_path: Path
) -> None:
    recipe = tiny.values(finished)
    prepared = str(finished / "out" / "prepared" / "seed0")
    overrides = [text.replace("{prepared}", prepared) for text in recipe["offline"]["overrides"]]
    launch(1, *overrides, f"output_dir={tmp_path}", "seed=0", config=Path(recipe["offline"]["recipe"]))
    alone = [row["trajectories"] for row in metrics(tmp_path)]
    assert len(set(alone)) == 3
    for arm in ("sft", "token"):
        assert [row["trajectories"] for row in metrics(finished / "out" / "seed0" / arm / "run")] == alone


def test_the_same_command_again_does_nothing(finished: Path) -> None:
    before, content = tiny.logs(finished), (finished / "out" / "results.json").read_bytes()
    compare(finished / "compare.yaml")
    assert tiny.logs(finished) == before
    assert (finished / "out" / "results.json").read_bytes() == content


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_nothing_had_happened(finished: Path, tmp_path: Path) -> None:
    tuned = {arm: content["tuned"] for arm, content in tiny.results(finished)["arms"].items()}
    arms = {
        arm: None if own is None else [*own, *tuned[arm]]
        for arm, own in tiny.values(finished)["arms"].items()
    }
    config = tiny.write(tmp_path, arms=arms, tune=None, prepared_dir=str(finished / "out" / "prepared"))
    seed = finished / "out" / "seed0"
    # Unseeded: each time the tests run, another moment; the command alone, or all that it started too.
    whole_group = random.random() < 0.5
    log = random.choice(sorted(seed.rglob("*.log"))).relative_to(finished)
    delay = random.random()
    process = tiny.start(config)
    while process.poll() is None and not (tmp_path / log).exists():
        time.sleep(0.02)
    time.sleep(delay)
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()  # its stages find out by themselves
    said = process.communicate(timeout=600)[0]
    assert process.returncode == -signal.SIGKILL, said
    compare(config)
    for arm, expected in tiny.results(finished)["arms"].items():
        arm_results = tiny.results(tmp_path)["arms"][arm]
        for key in ("measures", "against_baseline", "take_off", "rewards"):
            assert arm_results[key] == expected[key], (whole_group, log, delay, arm, key)
    for samples in seed.glob("*/*/samples.jsonl"):
        again = tmp_path / "out" / "seed0" / samples.relative_to(seed)
        assert again.read_bytes() == samples.read_bytes(), (whole_group, log, delay)


def test_a_finished_cell_that_is_damaged_is_named_with_file_and_line(finished: Path) -> None:
    path = finished / "out" / "seed0" / "token" / "rl" / "metrics.jsonl"
    whole = path.read_bytes()
    for damaged, said in (
        (
            whole[:-20],
            f"{path}:{len(whole.splitlines())} is damaged; put it back, or remove {path.parents[1]}",
        ),
        (whole[whole.index(b"\n") + 1 :], f"{path} does not have a row for each of the"),
        (None, f"{path} cannot be read (No such file or directory)"),
    ):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        assert said in compare(finished / "compare.yaml", code=1)
    path.write_bytes(whole)


def test_two_commands_at_once_are_refused_the_folder(finished: Path) -> None:
    from pear_megatron.storage import lock

    with lock(finished / "out", patience=0.0):
        assert "another pear-megatron compare is at work" in compare(finished / "compare.yaml", code=1)


def test_another_recipe_is_refused_the_folder_by_key(finished: Path) -> None:
    config, before = finished / "compare.yaml", tiny.logs(finished)
    said = compare(config, "eval.temperature=0.5", "tune=null", code=1)
    assert "holds a run with other settings: eval.temperature 1.0 -> 0.5" in said
    batch = "'train.global_batch_size=16','train.micro_batch_size=8'"
    longer = f"offline.overrides=['train.max_steps=4','checkpoint.pretrained=x',{batch}]"
    assert "offline.train.max_steps" in compare(config, longer, code=1)
    assert "was prepared by other commands (`python " in compare(config, "prepare=['python -c 1']", code=1)
    assert tiny.logs(finished) == before


@pytest.mark.slow
def test_a_cell_that_fails_is_named_with_its_log_and_the_others_finish(finished: Path) -> None:
    """And a seed may be added: the one that was there stays as it is."""
    out, before = finished / "out", tiny.results(finished)
    broken = out / "seed1" / "token" / "export"
    broken.mkdir(parents=True)
    shutil.copy(out / "seed0" / "token" / "export" / "config.json", broken)
    said = compare(finished / "compare.yaml", "seeds=[0,1]", code=1)
    assert "1 of 6 failed; the same command runs those again" in said
    assert f"token, seed 1: before failed (exit codes [1]); {out / 'seed1' / 'token' / 'before.log'}" in said
    assert (out / "seed1" / "no-offline-phase" / "done.json").exists()  # comes after the one that failed
    assert tiny.results(finished)["arms"] == before["arms"]  # of the seeds that are complete

    shutil.rmtree(broken)
    compare(finished / "compare.yaml", "seeds=[0,1]")
    content = tiny.results(finished)
    assert content["seeds"] == [0, 1]
    for name, arm in content["arms"].items():
        assert arm["rewards"][0] == before["arms"][name]["rewards"][0]
