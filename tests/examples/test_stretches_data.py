"""The stretches data files: valid training rows, reproducible from the seed, complete or absent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from examples.stretches import world
from examples.stretches.grader import grade
from examples.stretches.make_data import main, make_data, save_tokenizer, write_jsonl

pytest.importorskip("transformers", reason="the tokenizer needs the extra hf")

SIZES = {"num_base": 70, "num_offline": 50, "num_negatives": 40, "num_problems": 30, "num_heldout": 20}


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_aligned_and_carry_the_policys_logprobs(tmp_path: Path) -> None:
    make_data(tmp_path, seed=0, **SIZES)
    for name, count, p in (("base", 70, 0.9), ("offline", 50, 0.12)):
        rows = _rows(tmp_path / f"{name}.jsonl")
        assert len({row["id"] for row in rows}) == count
        for row in rows:
            ids, behavior = np.array(row["input_ids"]), np.array(row["behavior_logprobs"])
            assert len(ids) == len(behavior) == len(row["loss_mask"]) == world.SEQUENCE_LENGTH
            assert row["loss_mask"] == [0] * 33 + [1] * 33
            prompt, response = ids[:33], ids[33:]
            assert world.verify(prompt, response)
            careful = world.careful_stretches(response)
            expected = np.zeros(66)
            expected[33:65:8] = np.where(careful, np.log(p), np.log1p(-p))
            np.testing.assert_array_equal(behavior, expected)


def test_the_base_model_never_sees_the_operation_it_does_not_know(tmp_path: Path) -> None:
    make_data(tmp_path, seed=0, **SIZES)
    seen = {
        name: {
            world.TOKENS[t].rstrip(";")
            for row in _rows(tmp_path / f"{name}.jsonl")
            for t in row["input_ids"][:32]
        }
        for name in ("base", "offline")
    }
    assert seen["base"] == {"x+7", "5x", "11-x"}
    assert seen["offline"] == set(world.OPERATIONS)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        make_data(tmp_path / folder, seed=seed, **SIZES)
    for name in ("base.jsonl", "offline.jsonl", "negatives.jsonl", "problems.jsonl"):
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b
        assert a != c
    held_out = [(tmp_path / folder / "heldout.jsonl").read_bytes() for folder in "abc"]
    assert held_out[0] == held_out[1] == held_out[2]  # every run is asked the same


def test_one_files_size_changes_nothing_in_the_others(tmp_path: Path) -> None:
    make_data(tmp_path / "a", seed=0, **SIZES)
    make_data(tmp_path / "b", seed=0, **SIZES | {"num_base": 10})
    for name in ("offline.jsonl", "negatives.jsonl", "problems.jsonl", "heldout.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_file_that_could_not_be_finished_does_not_appear(tmp_path: Path) -> None:
    def failing():
        yield {"id": "a"}
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_jsonl(tmp_path / "data.jsonl", failing())
    assert not (tmp_path / "data.jsonl").exists()


def test_negatives_are_wrong_answers_with_reward_minus_one_and_exact_logprobs(tmp_path: Path) -> None:
    make_data(tmp_path, seed=0, **SIZES)
    rows = _rows(tmp_path / "negatives.jsonl")
    assert len(rows) == 40
    assert {row["reward"] for row in rows} == {-1.0}
    for row in rows:
        ids, logprobs = np.array(row["input_ids"]), row["behavior_logprobs"][33:]
        assert not world.verify(ids[:33], ids[33:])
        careful = world.careful_stretches(ids[33:])
        expected = np.zeros(33)
        expected[:32:8] = np.where(careful, np.log(0.12), np.log1p(-0.12))
        expected[7:32:8] = np.where(careful, 0.0, -np.log(23))
        np.testing.assert_allclose(logprobs, expected)


@pytest.mark.parametrize("name", ["problems", "heldout"])
def test_problems_and_their_grader_agree_with_the_worlds_verifier(tmp_path: Path, name: str) -> None:
    from pear_megatron.problems.load import load_problems
    from pear_megatron.problems.problem import ProblemsConfig

    make_data(tmp_path, seed=0, **SIZES)
    config = ProblemsConfig(jsonl=str(tmp_path / f"{name}.jsonl"), grader=str(tmp_path / f"{name}.py"))
    problems = load_problems(config)
    assert len(problems) == {"problems": 30, "heldout": 20}[name]
    rng = np.random.default_rng(0)
    for problem in problems:
        prompt = np.array([world.TOKENS.index(word) for word in problem.prompt.split()])
        for draw in (world.sample_answers, world.sample_guesses):
            response = draw(rng, prompt[None], 0.5).responses[0]
            assert problem.grade(world.to_text(response)) == float(world.verify(prompt, response))
        right = world.sample_answers(rng, prompt[None], 0.5).responses[0]
        for position in range(world.NUM_OPERATIONS):
            spoiled = right.copy()
            spoiled[position] = (spoiled[position] + 1) % world.MODULUS
            assert problem.grade(world.to_text(spoiled)) == float(world.verify(prompt, spoiled))


def test_the_grader_gives_nothing_for_an_answer_that_ends_early() -> None:
    symbols = ["1"] * 32
    assert grade(" ".join(symbols), "1 1 1 1", {}) == 1.0
    assert grade(" ".join(symbols[:31]), "1 1 1 1", {}) == 0.0
    assert grade("", "1 1 1 1", {}) == 0.0
    assert grade(" ".join([*symbols[:7], "~1", *symbols[8:]]), "1 1 1 1", {}) == 0.0


def test_the_tokenizers_ids_are_the_worlds(tmp_path: Path) -> None:
    from pear_megatron.data.tokenizer import load_tokenizer

    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert len(tokenizer) == world.VOCAB_SIZE
    ids = np.arange(world.VOCAB_SIZE)
    assert tokenizer(world.to_text(ids), add_special_tokens=False)["input_ids"] == ids.tolist()
    assert tokenizer.eos_token_id == world.END
    prompt = world.sample_problems(np.random.default_rng(0), 1)[0]
    assert tokenizer(world.to_text(prompt))["input_ids"] == prompt.tolist()
    assert tokenizer.decode(prompt) == world.to_text(prompt)


def test_the_command_line_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = ["--num-base", "2", "--num-offline", "2", "--num-heldout", "9"]
    main(["--out", str(tmp_path), "--seed", "1", *counts, "--show"])
    said = capsys.readouterr().out
    assert "offline.jsonl: 2 rows" in said
    assert "heldout.jsonl: 9 rows" in said
    assert "negatives.jsonl: 1000 rows" in said
    assert said.count(" right\n") == 2  # a trajectory of the base data and one of the offline data
    assert said.count(" wrong\n") == 1


@pytest.mark.parametrize(("name", "count"), [("offline", 50), ("negatives", 40)])
def test_the_loader_takes_the_rows(tmp_path: Path, name: str, count: int) -> None:
    from pear_megatron.data import DataConfig, TrajectoryDataset, prepare

    make_data(tmp_path, seed=0, **SIZES)
    config = DataConfig(
        train=[str(tmp_path / f"{name}.jsonl")], seq_length=65, cache_dir=str(tmp_path / "cache")
    )
    dataset = TrajectoryDataset.open(prepare(config, vocab_size=world.VOCAB_SIZE))
    assert len(dataset) == count
