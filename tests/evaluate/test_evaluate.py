"""eval: samples follow the model, do not depend on their batch, and survive a kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("scipy", reason="needs the extra eval")

from pear_megatron.data.errors import DataError
from pear_megatron.errors import EvalError
from pear_megatron.evaluate.results import Results, read_results
from pear_megatron.evaluate.run import evaluate
from pear_megatron.evaluate.sampling import Sampling
from pear_megatron.evaluate.transformers_engine import TransformersEngine
from pear_megatron.problems.load import load_problems, read_problems_config
from tests.distributed import run_ranks
from tests.evaluate.words import GRADER, WORDS, save_word_model, word_tokenizer, write_problems

END = len(WORDS) - 1


def run(model: Path, problems: Path, output: Path, **options: Any) -> Results:
    options = {
        "ks": [1, 4],
        "num_samples": 4,
        "max_new_tokens": 6,
        "right_at": 0.5,
        "batch_size": 5,
    } | options
    return evaluate(model, load_problems(read_problems_config(str(problems))), output, **options)


def samples(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    return sorted(rows, key=lambda row: (row["id"], row["sample"]))


def test_samples_follow_the_model_s_own_distribution(word_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    prompt, count = [0, 3, 1], 4000
    model = AutoModelForCausalLM.from_pretrained(word_model)
    with torch.no_grad():
        p = (model(torch.tensor([prompt])).logits[0, -1] / 0.8).softmax(-1)
    engine = TransformersEngine(word_model, [END], Sampling(0.8, 1.0, 1), "fp32")
    drawn = [c.tokens[0] for c in engine.generate([prompt] * count, list(range(count)))]
    seen = np.bincount(drawn, minlength=len(WORDS))
    expected = p.double().numpy() * count
    assert ((seen - expected) ** 2 / expected).sum() < 22.5  # chi-square of 6 degrees of freedom: 0.999


def test_top_p_draws_from_the_nucleus_only(word_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    prompt = [0, 3, 1]
    with torch.no_grad():
        p = AutoModelForCausalLM.from_pretrained(word_model)(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    order = p.argsort(descending=True)
    nucleus = set(order[: int((p[order].cumsum(0) < 0.6).sum()) + 1].tolist())
    engine = TransformersEngine(word_model, [END], Sampling(1.0, 0.6, 1), "fp32")
    assert {c.tokens[0] for c in engine.generate([prompt] * 300, list(range(300)))} == nucleus
    assert len(nucleus) < len(WORDS)


def test_temperature_zero_takes_the_likeliest_token(word_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run(word_model, write_problems(tmp_path), tmp_path / "out", temperature=0.0, num_samples=1, ks=[1])
    row = samples(tmp_path / "out")[0]
    tokens = [0]
    model = AutoModelForCausalLM.from_pretrained(word_model)
    while len(tokens) < 7 and tokens[-1] != END:
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert row["tokens"] == tokens[1:]
    with pytest.raises(EvalError, match="set num_samples to 1"):
        run(word_model, write_problems(tmp_path), tmp_path / "other", temperature=0.0)


def test_batch_size_changes_no_sample(word_model: Path, tmp_path: Path) -> None:
    problems = write_problems(tmp_path)
    for size in (1, 5, 64):
        run(word_model, problems, tmp_path / str(size), batch_size=size)
    assert samples(tmp_path / "1") == samples(tmp_path / "5") == samples(tmp_path / "64")
    assert len({row["response"] for row in samples(tmp_path / "1")}) > 12  # they are not all alike


def test_the_model_s_own_sampling_defaults_stay_out(word_model: Path, tmp_path: Path) -> None:
    greedy = shutil.copytree(word_model, tmp_path / "greedy")
    config = json.loads((greedy / "generation_config.json").read_text())
    (greedy / "generation_config.json").write_text(
        json.dumps({**config, "do_sample": True, "top_k": 1, "repetition_penalty": 5.0, "max_length": 3})
    )
    problems = write_problems(tmp_path)
    for name, model in (("plain", word_model), ("defaults", greedy)):
        run(model, problems, tmp_path / name)
    assert samples(tmp_path / "plain") == samples(tmp_path / "defaults")


def test_every_end_token_of_the_generation_config_ends_a_response(word_model: Path, tmp_path: Path) -> None:
    two_ends = shutil.copytree(word_model, tmp_path / "two-ends")
    config = json.loads((two_ends / "generation_config.json").read_text())
    (two_ends / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [END, 2]}))
    run(two_ends, write_problems(tmp_path), tmp_path / "out")
    for row in samples(tmp_path / "out"):
        ends = [token in (2, END) for token in row["tokens"]]
        assert not any(ends[:-1])
        assert row["truncated"] == (not ends[-1])
        assert len(row["tokens"]) == 6 or not row["truncated"]


def _with_template(model: Path, folder: Path, template: str) -> Path:
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_the_chat_template_s_end_of_turn_ends_a_response_too(word_model: Path, tmp_path: Path) -> None:
    turn = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %} .{% endif %} {% endfor %}"
    )
    model = _with_template(word_model, tmp_path / "model", turn)
    tokenizer = word_tokenizer(WORDS, end="c")
    tokenizer.add_special_tokens({"additional_special_tokens": ["."]})
    tokenizer.save_pretrained(model)
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": 2}))
    run(model, write_problems(tmp_path), tmp_path / "out")
    last = [row["tokens"][-1] for row in samples(tmp_path / "out") if not row["truncated"]]
    assert set(last) == {2, END}


def test_arguments_of_the_chat_template_reach_it(word_model: Path, tmp_path: Path) -> None:
    template = "{% if loud %}b {% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = _with_template(word_model, tmp_path / "model", template)
    problems = write_problems(tmp_path)
    run(model, problems, tmp_path / "plain")
    run(model, problems, tmp_path / "loud", chat_template_kwargs={"loud": True})
    assert samples(tmp_path / "plain") != samples(tmp_path / "loud")
    with pytest.raises(EvalError, match=r'chat_template_kwargs null -> \{"loud": true\}'):
        run(model, problems, tmp_path / "plain", chat_template_kwargs={"loud": True})


# Kills its own process at the 13th grade, once: what the kernel does to a job that is out of memory.
_KILLER = (
    GRADER
    + """
import os, pathlib, signal
count = 0
def kill_once():
    global count
    count += 1
    mark = pathlib.Path(__file__).with_name("killed-once")
    if count == 13 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
plain = grade
def grade(response, answer, problem):
    kill_once()
    return plain(response, answer, problem)
"""
)


def _run_on_a_rank(rank: int, model: Path, problems: Path, output: Path) -> None:
    run(model, problems, output)


def test_damaged_responses_are_drawn_again(
    word_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    problems, path = write_problems(tmp_path), tmp_path / "out" / "samples.jsonl"
    whole = run(word_model, problems, path.parent)
    before = path.read_bytes()
    lines = before.splitlines(keepends=True)
    lines[2:4] = [lines[2][:-9] + b"\n", b'{"id": "\xff"}\n']
    path.write_bytes(b"".join(lines))
    assert run(word_model, problems, path.parent).problems == whole.problems
    assert sorted(path.read_bytes().splitlines()) == sorted(before.splitlines())
    assert f"{path}:3 is damaged: the responses of its batch are drawn again" in caplog.text
    assert caplog.text.count("is damaged") == 2


def test_an_evaluation_killed_midway_continues_to_the_same_samples(word_model: Path, tmp_path: Path) -> None:
    problems = write_problems(tmp_path, grader=_KILLER)
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        run_ranks(1, _run_on_a_rank, word_model, problems, tmp_path / "killed")
    path = tmp_path / "killed" / "samples.jsonl"
    assert len(path.read_text().splitlines()) == 10  # two whole batches
    first = path.read_text()
    with path.open("a") as file:
        file.write(first.splitlines()[0][:40])  # a line that was being written
    killed = run(word_model, problems, tmp_path / "killed")
    whole = run(word_model, problems, tmp_path / "whole")
    assert path.read_text().startswith(first)
    assert path.read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()
    assert killed.problems == whole.problems


def test_a_finished_evaluation_draws_nothing_again(word_model: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    problems = write_problems(tmp_path)
    first = run(word_model, problems, tmp_path / "out")
    monkeypatch.setattr("pear_megatron.evaluate.run.load_engine", None)  # would raise if it were called
    assert run(word_model, problems, tmp_path / "out", batch_size=3).problems == first.problems


def test_a_changed_grader_grades_the_same_responses_again(word_model: Path, tmp_path: Path) -> None:
    problems = write_problems(tmp_path)
    run(word_model, problems, tmp_path / "out")
    before = samples(tmp_path / "out")
    problems.with_suffix(".py").write_text(
        "def grade(response, answer, problem):\n    return 2 * len(response)\n"
    )
    results = run(word_model, problems, tmp_path / "out")
    after = samples(tmp_path / "out")
    assert [row["tokens"] for row in after] == [row["tokens"] for row in before]
    assert [row["score"] for row in after] == [2.0 * len(row["response"]) for row in after]
    assert results.estimates()["score"].mean > 1.0


def test_another_evaluation_is_refused_its_folder(word_model: Path, tmp_path: Path) -> None:
    problems = write_problems(tmp_path)
    run(word_model, problems, tmp_path / "out")
    with pytest.raises(EvalError, match="max_new_tokens 6 -> 7; choose another --output"):
        run(word_model, problems, tmp_path / "out", max_new_tokens=7)
    other = save_word_model(tmp_path / "other", seed=1)
    with pytest.raises(EvalError, match="weights"):
        run(other, problems, tmp_path / "out")
    with pytest.raises(EvalError, match="problems"):
        run(word_model, write_problems(tmp_path, count=5), tmp_path / "out")


def test_results_add_up(word_model: Path, tmp_path: Path) -> None:
    run(word_model, write_problems(tmp_path), tmp_path / "out")
    results, rows = read_results(tmp_path / "out"), samples(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    estimates = content["estimates"]
    assert estimates["pass@1"]["mean"] == pytest.approx(np.mean([row["score"] >= 0.5 for row in rows]))
    assert estimates["score"]["mean"] == pytest.approx(np.mean([row["score"] for row in rows]))
    assert estimates["response_tokens"]["mean"] == pytest.approx(
        np.mean([len(row["tokens"]) for row in rows])
    )
    assert estimates["truncated"]["mean"] == pytest.approx(np.mean([row["truncated"] for row in rows]))
    solved = [any(r["score"] >= 0.5 for r in rows if r["id"] == p.id) for p in results.problems]
    assert estimates["pass@4"]["mean"] == pytest.approx(np.mean(solved))


def test_what_cannot_be_evaluated_is_said(word_model: Path, tmp_path: Path) -> None:
    problems = write_problems(tmp_path)
    megatron = tmp_path / "run"
    megatron.mkdir()
    (megatron / "model.yaml").touch()
    with pytest.raises(EvalError, match=f"export it first: pear-megatron export --checkpoint {megatron}"):
        run(megatron, problems, tmp_path / "out")
    with pytest.raises(EvalError, match="no such folder"):
        run(tmp_path / "nowhere", problems, tmp_path / "out")
    bare = save_word_model(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(EvalError, match="bare holds a model and no tokenizer; copy tokenizer.json"):
        run(bare, problems, tmp_path / "out")
    with pytest.raises(EvalError, match="from 1 to --num-samples 4"):
        run(word_model, problems, tmp_path / "out", ks=[8])
    with pytest.raises(
        DataError, match=r"problems.jsonl:6: the prompt of p5 has 7 tokens, which with 75 new"
    ):
        run(word_model, problems, tmp_path / "out", max_new_tokens=75)
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"prompt": [{"role": "user", "content": "a"}], "answer": "a"}))
    chat.with_suffix(".py").write_text(GRADER)
    with pytest.raises(DataError, match="no chat template"):
        run(word_model, chat, tmp_path / "out")


def test_the_stretches_world_is_words() -> None:
    from examples.stretches import world
    from tests.evaluate.words import word_tokenizer

    prompts = world.sample_problems(np.random.default_rng(0), 3)
    answers = world.sample_answers(np.random.default_rng(1), prompts, 0.5)
    tokenizer = word_tokenizer(world.TOKENS, world.TOKENS[world.END])
    for ids in (prompts[0], answers.responses[0][:-1]):
        text = " ".join(world.TOKENS[i] for i in ids)
        assert tokenizer(text)["input_ids"] == ids.tolist()
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=True) == text
    assert tokenizer.decode(answers.responses[0].tolist(), skip_special_tokens=True).split()[-1] != "."


def test_two_evaluations_are_not_in_one_folder(
    word_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pear_megatron.evaluate.run.PATIENCE", 0.2)
    from pear_megatron.errors import PearError
    from pear_megatron.storage import lock

    problems = write_problems(tmp_path)
    with (
        lock(tmp_path / "out", patience=0.0),
        pytest.raises(PearError, match="another evaluation is at work"),
    ):
        run(word_model, problems, tmp_path / "out")
    run(word_model, problems, tmp_path / "out")
