"""`pear-megatron validate`: what it says of text rows, and the trajectories that it shows."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from pear_megatron.cli import app
from pear_megatron.commands.validate import _show
from pear_megatron.data import Trajectory
from tests.byte_tokenizer import make_byte_tokenizer

FORGETS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'].split('</think>')[-1] if not loop.last else m['content'] }}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>add</think>4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "6"},
]
FIRST = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n[[<think>add</think>4<|im_end|>]]"
SECOND = "<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n[[6<|im_end|>]]"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    make_byte_tokenizer(FORGETS).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def data(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def validate(*arguments: object, ok: bool = True) -> str:
    done = CliRunner().invoke(app, ["validate", *map(str, arguments)], env={"COLUMNS": "160"})
    assert (done.exit_code == 0) == ok, done.output
    return done.stdout if ok else done.stderr


def test_it_says_how_much_of_the_mass_the_top_k_holds(tmp_path: Path) -> None:
    row = {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1], "behavior_logprobs": [None, -1.0, -2.0]}
    topk = {"behavior_topk_ids": [None, [2], [7, 3]], "behavior_topk_logprobs": [None, [-1.0], [-1.0, -2.0]]}
    said = validate(data(tmp_path, row | topk | {"reference_logprobs": [None, -1.5, -2.5]}))
    assert "up to 2 entries per decision, 43.55% of the mass on average" in said  # (2 / e + 1 / e^2) / 2
    assert "reference_logprobs" in said
    broken = row | topk | {"behavior_topk_ids": [None, [2], [7, 7]]}
    assert "behavior_topk_ids[2] has the id 7 twice" in validate(data(tmp_path, broken), ok=False)


def test_the_first_trajectory_is_shown_with_its_decisions_in_brackets(
    tmp_path: Path, tokenizer: Path
) -> None:
    said = validate(data(tmp_path, {"id": "m", "messages": TALK}), "--tokenizer", tokenizer, "--plain-sft")
    assert FIRST in said
    assert "m#0: " in said
    assert "[[6" not in said
    assert "1 row was split into 2 trajectories" in said
    assert "prompts and responses, no padding" in said


def test_show_says_how_many_and_id_which(tmp_path: Path, tokenizer: Path) -> None:
    file = data(tmp_path, {"id": "m", "messages": TALK}, {"id": "n", "prompt": "a", "response": "b"})
    common = (file, "--tokenizer", tokenizer, "--plain-sft")
    both = validate(*common, "--show", "2")
    assert FIRST in both
    assert SECOND in both
    assert "[[" not in validate(*common, "--show", "0")
    turns = validate(*common, "--id", "m")
    assert turns.count("[[") == 2
    assert SECOND in turns
    one = validate(*common, "--id", "m#1")
    assert one.count("[[") == 1
    assert SECOND in one
    assert "[[b<|im_end|>]]" in validate(*common, "--id", "n")
    assert "--id nobody: no trajectory has this id; the first are m#0, m#1, n" in validate(
        *common, "--id", "nobody", ok=False
    )


def test_a_long_trajectory_is_cut_in_its_middle(tmp_path: Path, tokenizer: Path) -> None:
    file = data(tmp_path, {"prompt": "x" * 2000, "response": "end"})
    said = validate(file, "--tokenizer", tokenizer, "--plain-sft")
    head = next(line for line in said.splitlines() if line.endswith(" tokens, 4 decisions, reward 1"))
    tokens = int(head.split(": ")[-1].split()[0].replace(",", ""))
    assert tokens > 2000
    assert f"x\n... {tokens - 800:,} tokens left out ...\nx" in said
    assert said.rstrip().endswith("[[end<|im_end|>]]")


def test_ids_without_a_tokenizer_are_not_shown_and_said_so(tmp_path: Path) -> None:
    row = {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}
    said = validate(data(tmp_path, row), "--plain-sft")
    assert "no trajectory is shown: the rows are token ids; name the tokenizer (--tokenizer)" in said
    assert "no trajectory is shown" not in validate(data(tmp_path, row), "--plain-sft", "--show", "0")


def test_options_of_text_rows_are_taken(tmp_path: Path, tokenizer: Path) -> None:
    file = data(tmp_path, {"id": "m", "messages": TALK})
    template = tmp_path / "t.jinja"
    template.write_text("{% if shout %}!!{% endif %}" + FORGETS)
    common = (file, "--tokenizer", tokenizer, "--plain-sft", "--chat-template", template)
    assert "!!" + FIRST in validate(*common, "--chat-template-kwargs", '{"shout": true}')
    assert "--multi-turn" in validate(*common, "--multi-turn", "whole", ok=False)
    for wrong in ("{shout}", "[1]"):
        assert "--chat-template-kwargs" in validate(*common, "--chat-template-kwargs", wrong, ok=False)


def test_a_terminal_gets_colours_instead_of_brackets(tmp_path: Path) -> None:
    tokenizer = make_byte_tokenizer()
    ids = np.array(tokenizer("a[red]b<|im_end|>")["input_ids"], dtype=np.int32)
    mask = np.arange(len(ids)) > 0
    out = StringIO()
    _show(
        Console(file=out, force_terminal=True, color_system="standard"),
        Trajectory("t", ids, mask, -1.0 * mask),
        tokenizer,
    )
    assert "[[" not in out.getvalue()
    assert "\x1b[30;42m[red]b<|im_end|>\x1b[0m" in out.getvalue()


def test_errors_name_the_options_of_the_command_and_not_the_keys_of_a_recipe(tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "Hi", "response": "Hello"}
    said = validate(data(tmp_path, row), "--plain-sft", ok=False)
    assert "prompt is text and --tokenizer is not set" in said
    assert "data.tokenizer" not in said
    said = validate(data(tmp_path, row), "--plain-sft", "--tokenizer", tmp_path / "none", ok=False)
    assert "--tokenizer = " in said
    assert "data.tokenizer" not in said
    assert "check the path" in validate(tmp_path / "none.jsonl", "--plain-sft", ok=False)


def test_an_over_long_row_is_refused_with_the_option_that_takes_it(tmp_path: Path) -> None:
    row = {"id": "a", "input_ids": list(range(9)), "loss_mask": [0, *[1] * 8]}
    said = validate(data(tmp_path, row), "--plain-sft", "--seq-length", 4, ok=False)
    assert "over-long for --seq-length = 4" in said


def test_rows_marked_truncated_are_kept_on_request(tmp_path: Path) -> None:
    row = {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1], "behavior_logprobs": [None, -0.1, -0.2]}
    file = data(tmp_path, row, {**row, "truncated": True})
    assert "1" in validate(file).split("dropped as truncated")[1].split("\n")[0]
    assert "2" in validate(file, "--truncated", "keep").split("trajectories")[1].split("\n")[0]
    assert "--truncated drop" in validate(file, "--truncated", "error", ok=False)


def test_ids_are_refused_without_a_vocabulary_in_words(tmp_path: Path) -> None:
    row = {"input_ids": [1, -2, 3], "loss_mask": [0, 1, 1]}
    said = validate(data(tmp_path, row), "--plain-sft", ok=False)
    assert "input_ids[1] = -2 is no token id, which is from 0 up" in said
    assert "2147483647" not in said
