"""The command as a user types it: data, recipes, overrides, what it refuses and what it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pear_megatron.cli import app
from pear_megatron.data import load_tokenizer, tokenizer_hash
from pear_megatron.inspect.alternatives import Alternative
from pear_megatron.inspect.run import table_lines
from tests.byte_tokenizer import CHATML, save_byte_tokenizer
from tests.inspect.scored_rows import Inspect, scored
from tests.megatron.runs import TINY
from tests.structured import make_rows, write_rows


def test_without_a_policy_it_shows_the_data_and_says_what_to_add(inspect: Inspect, tmp_path: Path) -> None:
    found = inspect(write_rows(tmp_path / "data.jsonl", make_rows(10)))
    assert found.exit_code == 0, found.stderr
    assert "--model DIR" in found.verdict("no ratios yet")["change"]
    assert "statistics" not in found.numbers
    assert found.numbers["quantiles"]["behavior_logprobs"]["mean"] < 0
    assert found.page is not None
    assert "Behaviour log-probs" in found.page


def test_data_without_log_probs_are_told_to_be_scored(inspect: Inspect, tmp_path: Path) -> None:
    rows = make_rows(5)
    for row in rows:
        del row["behavior_logprobs"]
    found = inspect(write_rows(tmp_path / "data.jsonl", rows))
    assert found.exit_code == 0, found.stderr
    assert "pear-megatron score --model WRITER" in found.verdict("no ratios yet")["change"]
    refused = inspect(write_rows(tmp_path / "data.jsonl", rows), "--scored")
    assert refused.exit_code == 1
    assert "missing field 'behavior_logprobs'" in refused.stderr


def test_broken_data_give_the_loaders_message_and_exit_code_one(inspect: Inspect, tmp_path: Path) -> None:
    rows = scored()
    rows[2]["behavior_logprobs"] = rows[2]["behavior_logprobs"][1:]
    data = write_rows(tmp_path / "data.jsonl", rows)
    found = inspect(data, "--scored")
    assert found.exit_code == 1
    assert f"error: 1 problem in the data:\n  {data}:3: behavior_logprobs has 59 entries" in found.stderr
    assert found.page is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "missing field 'policy_logprobs': --scored reads the policy's log-probs from it"),
        (0.5, "policy_logprobs[9] = 0.5 on a decision is no log-probability"),
    ],
)
def test_policy_logprobs_must_be_there_and_be_log_probs(
    inspect: Inspect, tmp_path: Path, value: float | None, said: str
) -> None:
    rows = scored()
    if value is None:
        del rows[4]["policy_logprobs"]
    else:
        rows[4]["policy_logprobs"][9] = value
    found = inspect(write_rows(tmp_path / "data.jsonl", rows), "--scored")
    assert found.exit_code == 1
    assert f"data.jsonl:5: {said}" in found.stderr


def test_a_recipe_gives_data_and_settings_and_overrides_win(inspect: Inspect, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", scored(lambda lb, rng: lb + rng.gauss(0, 0.2)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"defaults: {TINY}\ndata: {{train: {data}, seq_length: 128}}\npear: {{variant: block, gamma: 0.9}}\n"
    )
    found = inspect("--config", recipe, "--scored", "pear.gamma=0.95", "pear.log_ratio_clip=[-0.2,0.2]")
    assert found.exit_code == 0, found.stderr
    settings = found.numbers["settings"]
    assert (settings["variant"], settings["gamma"], settings["log_ratio_clip"]) == (
        "block",
        0.95,
        [-0.2, 0.2],
    )
    alone = inspect(
        data, "--scored", "pear.variant=block", "pear.gamma=0.95", "pear.log_ratio_clip=[-0.2,0.2]"
    )
    assert alone.numbers["statistics"] == found.numbers["statistics"]


def test_a_blend_is_looked_at_as_its_files_together(inspect: Inspect, tmp_path: Path) -> None:
    rows = scored(lambda lb, rng: lb + rng.gauss(0, 0.2))
    whole = inspect(write_rows(tmp_path / "data.jsonl", rows), "--scored")
    parts = [write_rows(tmp_path / "a.jsonl", rows[:9]), write_rows(tmp_path / "b.jsonl", rows[9:])]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"defaults: {TINY}\ndata:\n  seq_length: 128\n  train:\n"
        f"  - {{path: {parts[0]}, name: a, weight: 3}}\n  - {{path: {parts[1]}, name: b, weight: 1}}\n"
    )
    found = inspect("--config", recipe, "--scored")
    assert found.exit_code == 0, found.stderr
    assert found.numbers["statistics"] == whole.numbers["statistics"]
    write_rows(parts[1], rows[:9])  # ids that the other one has too
    assert "cannot be told apart" in inspect("--config", recipe, "--scored").stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["DATA", "--scored", "pear.gama=0.9"], "unknown key 'gama'; did you mean 'gamma'?"),
        (["DATA", "--scored", "pear.gamma=2"], "gamma: Input should be less than or equal to 1"),
        (["DATA", "--scored", "train.max_steps=3"], "without --config RECIPE.yaml only pear.KEY=VALUE"),
        (["DATA", "--scored", "--model", "x"], "--model and --scored both name"),
        (["DATA", "--model", "/nowhere"], "no model at /nowhere"),
        (["--scored"], "no data: name JSONL or Parquet files"),
        (["/nowhere/data.jsonl"], "/nowhere/data.jsonl: no such file"),
    ],
)
def test_mistakes_are_one_line(inspect: Inspect, tmp_path: Path, arguments: list[str], said: str) -> None:
    data = write_rows(tmp_path / "data.jsonl", scored(count=3))
    found = inspect(*(data if word == "DATA" else word for word in arguments))
    assert found.exit_code == 1
    assert found.stderr.startswith("error: ")
    assert said in found.stderr


def test_a_page_that_is_there_is_replaced_only_when_asked(inspect: Inspect, tmp_path: Path) -> None:
    data, page = write_rows(tmp_path / "data.jsonl", make_rows(3)), tmp_path / "mine.html"
    page.write_text("mine")
    done = CliRunner().invoke(app, ["inspect", str(data), "--output", str(page)])
    assert done.exit_code == 1
    assert f"{page} is there; name another --output, or replace it with --overwrite" in done.stderr
    assert page.read_text() == "mine"
    assert inspect(data, "--overwrite").exit_code == 0
    done = CliRunner().invoke(app, ["inspect", str(data), "--output", str(page), "--overwrite"])
    assert done.exit_code == 0
    assert page.read_text() != "mine"


@pytest.mark.parametrize("change", ["other_words", "other_template"])
def test_another_tokenizer_or_chat_template_is_refused(
    inspect: Inspect, tmp_path: Path, byte_folder: Path, change: str
) -> None:
    rows = scored(lambda lb, rng: lb + rng.gauss(0, 0.2))
    ours = tokenizer_hash(load_tokenizer(str(byte_folder)))
    theirs = tokenizer_hash(load_tokenizer(str(save_byte_tokenizer(tmp_path / "theirs", **{change: True}))))
    for row in rows:
        row["tokenizer_hash"] = ours
    data = write_rows(tmp_path / "data.jsonl", rows)
    assert inspect(data, "--scored", "--tokenizer", byte_folder).exit_code == 0
    rows[3]["tokenizer_hash"] = theirs
    found = inspect(write_rows(data, rows), "--scored", "--tokenizer", byte_folder)
    assert found.exit_code == 1
    assert f"{data}:4: tokenizer_hash" in found.stderr
    assert "score the data again" in found.stderr


def test_a_draw_is_said_on_the_page_and_can_be_repeated(inspect: Inspect, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", scored(lambda lb, rng: lb + rng.gauss(0, 0.2)))
    few = [inspect(data, "--scored", "--max-trajectories", 9, "--seed", seed).numbers for seed in (1, 1, 2)]
    assert few[0]["facts"]["looked at"].startswith("9, drawn at random (seed 1)")
    assert few[0] == few[1]
    assert few[0]["statistics"] != few[2]["statistics"]
    assert inspect(data, "--scored").numbers["facts"]["looked at"] == "all"


def test_parquet_and_rows_without_ids_work(inspect: Inspect, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = scored(lambda lb, rng: lb + rng.gauss(0, 0.2))
    for row in rows:
        del row["id"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    parquet = inspect(tmp_path / "data.parquet", "--scored", "--max-trajectories", 20)
    assert parquet.exit_code == 0, parquet.stderr
    lines = inspect(write_rows(tmp_path / "data.jsonl", rows), "--scored", "--max-trajectories", 20)
    assert parquet.numbers["statistics"] == lines.numbers["statistics"]


def test_the_terminal_has_verdicts_and_settings(inspect: Inspect, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", scored(lambda lb, rng: lb - 1, tokens=300, count=6))
    out = inspect(data, "--scored").stdout
    assert "warning: collapse to the floor." in out
    assert "pear.log_ratio_clip=[-0.08,0.08] pear.baseline=sequence_mean" in out
    assert "page: " in out


def test_an_output_that_cannot_be_written_is_said(inspect: Inspect, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", scored(count=3))
    (tmp_path / "page.html").mkdir()
    found = CliRunner().invoke(
        app, ["inspect", str(data), "--scored", "--output", str(tmp_path / "page.html")]
    )
    assert found.exit_code == 1
    assert "page.html cannot be written" in found.stderr


def test_help_has_an_example() -> None:
    assert "Example: pear-megatron inspect" in CliRunner().invoke(app, ["inspect", "--help"]).stdout


def test_text_rows_take_the_template_and_turns_of_the_command_line(inspect: Inspect, tmp_path: Path) -> None:
    folder = save_byte_tokenizer(tmp_path / "tokenizer")
    messages = [{"role": role, "content": "hi"} for role in ("user", "assistant")] * 2
    data = write_rows(tmp_path / "data.jsonl", [{"id": "m", "messages": messages}])
    template = tmp_path / "loud.jinja"
    template.write_text("{% if shout %}!!{% endif %}" + CHATML)
    common = (data, "--tokenizer", folder, "--chat-template", template)
    whole = inspect(*common, "--chat-template-kwargs", '{"shout": true}')
    split = inspect(*common, "--multi-turn", "split")
    for found, trajectories in ((whole, 1), (split, 2)):
        assert found.exit_code == 0, found.stderr
        assert found.numbers["counts"]["trajectories"] == trajectories
    wrong = inspect(*common, "--chat-template-kwargs", "shout")
    assert wrong.exit_code == 1
    assert "--chat-template-kwargs" in wrong.stderr


def test_scored_says_what_to_do_with_a_conversation_that_is_split(inspect: Inspect, tmp_path: Path) -> None:
    folder = save_byte_tokenizer(tmp_path / "tokenizer")
    messages = [{"role": role, "content": "hi"} for role in ("user", "assistant")] * 2
    data = write_rows(tmp_path / "data.jsonl", [{"id": "m", "messages": messages}])
    options = (data, "--tokenizer", folder, "--multi-turn", "split", "--scored", "pear.variant=none")
    found = inspect(*options)
    assert found.exit_code == 1
    assert "m#0: its row is split into turns" in found.stderr
    assert "pear-megatron score --as policy" in found.stderr


def test_the_table_of_settings_is_readable_in_a_narrow_terminal() -> None:
    statistics = {
        "weight": 1.5, "effective_sample_size": 0.5, "weight_at_floor": 0.25, "weight_at_ceiling": 0.0,
        "ratio_clipped_low": 0.125,
    }  # fmt: skip
    long = "pear.log_ratio_clip=[-0.08,0.08] pear.baseline=sequence_mean"
    rows = [Alternative(name, statistics, 0.4, 0.9, 1.1) for name in ("", long)]
    wide = table_lines(rows, 150)
    assert [line.split("  ")[0].strip() for line in wide[1:]] == ["setting", "as given", long]
    assert len({len(line) for line in wide[1:]}) == 1
    narrow = table_lines(rows, 80)
    assert narrow[1::2] == ["setting", "as given", long]
    assert max(map(len, narrow)) <= 80
    assert narrow[4].split() == ["1.5", "50%", "0.40", "25%", "0%", "12%", "0.9", "1.1"]
