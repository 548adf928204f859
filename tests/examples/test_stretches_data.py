"""The stretches data files: valid training rows, reproducible from the seed, complete or absent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.stretches import world
from examples.stretches.make_data import main, make_data, read_problems, write_jsonl
from examples.stretches.model import shared_position_embedding

SIZES = {"num_base": 70, "num_offline": 50, "num_heldout": 20}


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
        name: {world.TOKENS[t] for row in _rows(tmp_path / f"{name}.jsonl") for t in row["input_ids"][:32]}
        for name in ("base", "offline")
    }
    assert seen["base"] == {"x+7", "5x", "11-x"}
    assert seen["offline"] == set(world.OPERATIONS)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        make_data(tmp_path / folder, seed=seed, **SIZES)
    for name in ("base.jsonl", "offline.jsonl", "heldout.jsonl"):
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b
        assert a != c


def test_one_files_size_changes_nothing_in_the_others(tmp_path: Path) -> None:
    make_data(tmp_path / "a", seed=0, **SIZES)
    make_data(tmp_path / "b", seed=0, **SIZES | {"num_base": 10})
    for name in ("offline.jsonl", "heldout.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_file_that_could_not_be_finished_does_not_appear(tmp_path: Path) -> None:
    def failing():
        yield {"id": "a"}
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_jsonl(tmp_path / "data.jsonl", failing())
    assert not (tmp_path / "data.jsonl").exists()


def test_the_command_line_writes_problems_that_read_back(tmp_path: Path, capsys) -> None:
    counts = ["--num-base", "2", "--num-offline", "2", "--num-heldout", "9"]
    main(["--out", str(tmp_path), "--seed", "1", *counts, "--show"])
    ids, prompts = read_problems(tmp_path / "heldout.jsonl")
    assert len(ids) == 9
    assert prompts.shape == (9, world.PROMPT_LENGTH)
    assert world.run_program(prompts).max() < world.MODULUS
    assert "offline.jsonl: 2 rows" in capsys.readouterr().out


def test_the_loader_takes_the_rows(tmp_path: Path) -> None:
    from pear_megatron.data import DataConfig, TrajectoryDataset, prepare

    make_data(tmp_path, seed=0, **SIZES)
    config = DataConfig(
        train=[str(tmp_path / "offline.jsonl")], seq_length=65, cache_dir=str(tmp_path / "cache")
    )
    dataset = TrajectoryDataset.open(prepare(config, vocab_size=world.VOCAB_SIZE))
    assert len(dataset) == 50


def test_the_place_that_predicts_a_symbol_starts_with_its_operations_position_vector() -> None:
    table = torch.randn(world.SEQUENCE_LENGTH, 8)
    shared = shared_position_embedding(table)
    for j in range(world.NUM_OPERATIONS):
        predicts_symbol_j = world.PROMPT_LENGTH + j - 1
        assert torch.equal(shared[predicts_symbol_j], table[j])
    assert torch.equal(shared[:32], table[:32])
    assert torch.equal(shared[64:], table[64:])
    with pytest.raises(ValueError, match="max_pos >= 65"):
        shared_position_embedding(table[:64])
