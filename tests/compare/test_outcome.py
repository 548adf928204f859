"""Take-off, smoothing, measures and paired differences, worked by hand; and the page that shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs the extra eval")

from pear_megatron.compare.figures import _smooth
from pear_megatron.compare.markdown import markdown_table
from pear_megatron.compare.outcome import Outcome, take_off
from pear_megatron.compare.page import page
from pear_megatron.compare.report import print_table
from pear_megatron.compare.table import make_table
from pear_megatron.compare.verdicts import verdicts
from tests.compare import made

STEPS = 8
FLAT = [0.0] * STEPS
# Means of five: 0.02 at step 5, 0.06, 0.12 at step 7, 0.2.
RISING = [0.0, 0.0, 0.0, 0.0, 0.1, 0.2, 0.3, 0.4]


def test_take_off_is_the_first_step_at_which_the_mean_of_five_reaches_the_threshold() -> None:
    rewards = np.array(RISING)
    assert [take_off(rewards, threshold) for threshold in (0.02, 0.05, 0.1, 0.2)] == [5, 6, 7, 8]
    assert take_off(rewards, 0.21) is None
    assert take_off(np.full(5, 0.1), 0.1) == 5  # five times 0.1 / 5 is a hair below 0.1 in floating point
    assert take_off(np.full(4, 1.0), 0.1) is None  # no five steps
    # One lucky step counts until it leaves the window.
    assert take_off(np.array([9.0, 0, 0, 0, 0, 0]), 1.0) == 5


def test_smoothing_is_the_mean_of_five_steps_or_of_as_many_as_there_are() -> None:
    rng = np.random.default_rng(0)
    for steps in (1, 4, 5, 6, 30):
        rewards = rng.random((3, steps))
        expected = [rewards[:, max(0, i - 4) : i + 1].mean(axis=1) for i in range(steps)]
        np.testing.assert_allclose(_smooth(rewards), np.stack(expected, axis=1), atol=1e-12)


@pytest.fixture
def outcome(tmp_path: Path) -> Outcome:
    """Two seeds: SFT takes off on one of them, token on both, the third arm on none."""
    recipe = made.recipe(tmp_path, seeds=[0, 1])
    return made.outcome(
        recipe,
        {
            "SFT": [RISING, FLAT],
            "token": [[0.3] * STEPS, [0.1] * STEPS],
            "no offline phase": [FLAT, FLAT],
        },
    )


def measure(outcome: Outcome, key: str) -> Any:
    return next(m for m in outcome.measures if m.key == key)


def test_measures_by_hand(outcome: Outcome) -> None:
    assert outcome.take_offs("SFT") == [7, None]
    steps = measure(outcome, "take_off")
    assert steps.values["SFT"].tolist() == [7, 8]  # a run without take-off counts with RL's length
    assert steps.values["no offline phase"].tolist() == [8, 8]
    assert steps.estimate("SFT").mean == 7.5
    area = measure(outcome, "mean_reward")
    assert area.values["SFT"] == pytest.approx([0.125, 0.0])
    assert area.estimate("token").mean == pytest.approx(0.2)
    # Of 4 problems with 2 samples: 2, 1, 0 and (the seed's number) right.
    assert measure(outcome, "after/pass@1").values["SFT"].tolist() == [[1, 0.5, 0, 0], [1, 0.5, 0, 0.5]]
    assert measure(outcome, "after/pass@2").values["SFT"].tolist() == [[1, 1, 0, 0], [1, 1, 0, 1]]
    assert measure(outcome, "before/pass@1").estimate("token").mean == 0.0
    assert [m.key for m in outcome.measures] == [
        "before/pass@1", "before/pass@2", "after/pass@1", "after/pass@2", "take_off", "mean_reward",
    ]  # fmt: skip


def test_differences_are_paired_by_seed(outcome: Outcome) -> None:
    steps = measure(outcome, "take_off").difference("token", "SFT")
    assert steps.mean == -2.5  # 5 - 7 and 5 - 8
    half = 12.706204736 * 0.5  # Student's t of one degree of freedom times 0.7071 / sqrt(2)
    # Of 8 steps, 7 are the most there can be.
    assert (steps.low, steps.high) == pytest.approx((-7.0, -2.5 + half))
    area = measure(outcome, "mean_reward").difference("token", "SFT")
    # 0.175 and 0.1: seeds that are bad for both arms are bad for neither in the difference.
    assert area.mean == pytest.approx(0.1375)
    assert area.high - area.mean == pytest.approx(12.706204736 * 0.0375)
    same = measure(outcome, "after/pass@1").difference("token", "SFT")
    assert same.mean == 0.0
    assert same.low < 0 < same.high  # 4 problems that agree are no certainty


def test_differences_stay_within_what_can_be(outcome: Outcome) -> None:
    for m in outcome.measures:
        low, high = m.bounds
        for arm in outcome.recipe.arms:
            e = m.difference(arm, "SFT")
            assert low - high <= e.low <= e.mean <= e.high <= high - low


def test_json_holds_everything_and_survives_a_round_trip(outcome: Outcome) -> None:
    content = outcome.as_json()
    assert json.loads(json.dumps(content)) == content
    assert content["seeds"] == [0, 1]
    token = content["arms"]["token"]
    assert token["rewards"] == [[0.3] * STEPS, [0.1] * STEPS]
    assert token["take_off"] == [5, 5]
    assert token["against_baseline"]["take_off"]["mean"] == -2.5
    assert content["arms"]["SFT"]["against_baseline"] is None
    assert content["arms"]["no offline phase"]["overrides"] is None


def test_the_page_shows_arms_numbers_and_pictures_and_needs_nothing_else(outcome: Outcome) -> None:
    text = page(outcome)
    assert text.count("<svg") == text.count("</svg>") == 4  # two pictures, broad and narrow
    assert "<script" not in text
    assert "http-equiv" not in text
    assert not [word for word in ("src=", "@import") if word in text]
    for arm in outcome.recipe.arms:
        assert f'<th scope="row">{arm}</th>' in text
    assert "-2.5<br/><small>[" in text  # token's take-off against SFT's
    assert "2 steps, each of 2 problems with 4 responses" in text
    assert "3 on 2 seeds" in text
    assert "4 held-out problems, 2 responses to each" in text
    assert "no offline phase</code>" in text


def test_only_intervals_without_zero_are_bold(tmp_path: Path) -> None:
    rewards = {"SFT": [FLAT, FLAT], "token": [[0.5] * STEPS, [0.5001] * STEPS]}
    recipe = made.recipe(tmp_path, seeds=[0, 1], arms={"SFT": [], "token": []}, tune=None)
    text = page(made.outcome(recipe, rewards))
    assert "<strong>+0.500<br/><small>[" in text
    assert "<strong>+0.000" not in text


def test_one_seed_has_no_intervals_of_what_is_one_number_a_seed(tmp_path: Path) -> None:
    recipe = made.recipe(tmp_path, arms={"SFT": [], "token": []}, tune=None)
    text = page(made.outcome(recipe, {"SFT": [FLAT], "token": [RISING]}))
    assert "<td>-1.0</td>" in text
    assert "<td>+0.125</td>" in text
    assert "One seed: intervals of pass@k cover problems only" in text


def test_names_of_arms_are_text_in_tables_and_pictures(tmp_path: Path) -> None:
    names = ["<b>SFT & co</b>", r"a$\oops$", "_hidden"]
    recipe = made.recipe(tmp_path, arms={name: [] for name in names}, baseline=names[0], tune=None)
    text = page(made.outcome(recipe, {name: [RISING] for name in names}))
    assert "<b>" not in text
    assert text.count("&lt;b&gt;SFT &amp; co&lt;/b&gt;") >= 4  # tables, and the legend of each picture
    assert text.count("_hidden") >= 5
    assert text.count(r"a$\oops$") >= 5


def test_page_terminal_and_markdown_show_the_same_numbers(
    outcome: Outcome, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    results = json.loads(json.dumps(outcome.as_json()))
    print_table(outcome)
    shown = {"page": page(outcome), "terminal": capsys.readouterr().out, "markdown": markdown_table(results)}
    rows = make_table(results).rows
    assert [row.arm for row in rows if row.differences is None] == ["SFT"]
    for where, text in shown.items():
        for row in rows:
            clear = [entry for entry in row.differences or [] if entry.clear or where != "markdown"]
            for entry in [*row.means, *clear]:
                assert entry.mean in text, where
                assert entry.interval in text, where


def test_tuning_takes_the_value_with_the_highest_mean_reward_over_rl_for_each_arm(tmp_path: Path) -> None:
    from pear_megatron.compare.cell import tuning_cells
    from pear_megatron.compare.run import Comparison

    recipe = made.recipe(tmp_path, tune={"seed": 9, "values": [1e-3, 2e-3, 4e-3]})
    rewards = {"SFT": ([0.1, 0.2], [0.0, 0.5], [0.3, 0.0]), "token": ([0.2, 0.2], [0.0, 0.1], [0.1, 0.3])}
    tuning = tuning_cells(recipe)
    for arm, by_value in tuning.items():
        for cell, curve in zip(by_value.values(), rewards[arm], strict=True):
            rows = [{"step": step, "reward": reward} for step, reward in enumerate(curve, 1)]
            made.write_rows(cell.folder / "rl", rows)
    chosen = Comparison(recipe)._choose(tuning)
    assert chosen == {"SFT": ("optimizer.lr=0.002",), "token": ("optimizer.lr=0.001",)}  # a tie: the first


@pytest.mark.parametrize(
    ("asked", "jobs", "of_ranks", "alone"), [("", 1, 4, 8), ("1", 1, 1, 1), ("6", 1, 4, 6), ("3", 4, 1, 2)]
)
def test_a_process_takes_its_share_of_the_cores_and_no_more_than_omp_num_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, jobs: int, of_ranks: int, alone: int
) -> None:
    from pear_megatron.compare.run import Comparison

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    base = made.recipe(tmp_path)
    recipe = base.model_copy(update={"offline": base.offline.model_copy(update={"processes": 2})})
    comparison = Comparison(recipe, jobs)
    comparison._count_cores()
    assert (comparison._threads, comparison._threads_alone) == (of_ranks, alone)


def test_verdicts_say_what_the_numbers_do_not(tmp_path: Path) -> None:
    def titles(rewards: dict[str, list[list[float]]], **changes: object) -> list[str]:
        recipe = made.recipe(
            tmp_path,
            seeds=list(range(len(rewards["SFT"]))),
            arms={name: [] for name in rewards},
            tune=None,
            **changes,
        )
        outcome = made.outcome(recipe, rewards)
        found = verdicts(outcome, make_table(outcome.as_json()))
        assert all(verdict.change for verdict in found)
        return [verdict.title for verdict in found]

    low, high = [0.01] * STEPS, [0.5] * STEPS
    assert titles({"SFT": [low], "token": [low]}) == ["RL never took off", "one seed"]
    assert titles({"SFT": [low, high], "token": [high, high]}) == [
        "runs that never took off",
        "few seeds",
        "no clear difference from SFT",
    ]
    many = [[0.5 + i / 1000] * STEPS for i in range(4)]
    better = [[reward + 0.2 + i / 1000 for reward in row] for i, row in enumerate(many)]
    assert titles({"SFT": many, "token": better}) == [
        "rewarded from the start",
        "differences from SFT whose intervals exclude 0",
    ]


def test_a_best_value_at_the_edge_is_said(tmp_path: Path) -> None:
    recipe = made.recipe(tmp_path, tune={"seed": 9, "values": [1e-3, 2e-3, 4e-3]})
    one = made.outcome(recipe, {arm: [RISING] for arm in recipe.arms})
    tried = {"SFT": {1e-3: 0.1, 2e-3: 0.2, 4e-3: 0.0}, "token": {1e-3: 0.1, 2e-3: 0.2, 4e-3: 0.3}}
    tuned = Outcome(recipe, {}, one.results, tried)
    (edge,) = [v for v in verdicts(tuned, make_table(tuned.as_json())) if "edge" in v.title]
    assert edge.text.startswith("token (0.004): the best optimizer.lr")


def test_a_dagger_says_what_stays_clear_when_the_number_of_arms_is_corrected_for(tmp_path: Path) -> None:
    doubtful = [[0.1] * STEPS, [0.137] * STEPS, [0.068] * STEPS]  # p = 0.037, and twice that for two arms
    for others in (["one"], ["one", "another"]):
        arms: dict[str, list[str] | None] = {arm: [] for arm in ("SFT", *others)}
        recipe = made.recipe(tmp_path / "-".join(others), seeds=[0, 1, 2], arms=arms, tune=None)
        found = made.outcome(recipe, {"SFT": [FLAT] * 3, **dict.fromkeys(others, doubtful)})
        table = make_table(found.as_json())
        area = table.titles.index("mean reward during RL")
        entry = table.rows[1].differences[area]  # type: ignore[index]
        assert entry.clear
        assert entry.corrected == (len(others) == 1)
        assert str(entry).endswith(" †") == entry.corrected
        assert ("†" in markdown_table(found.as_json())) == entry.corrected
