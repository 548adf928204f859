"""From files to the scored file, and the scored file into training's loader."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from pear_megatron.data import DataError, Trajectory
from pear_megatron.errors import RecipeError, ScoreError
from tests.byte_tokenizer import make_byte_tokenizer
from tests.distributed import run_ranks
from tests.score.jobs import chat_row, opened, rows_of_ids, run_job, score_rows, some_rows, write_jsonl
from tests.score.tiny import plainly_scored, save_tiny_llama, without_tokenizer


def test_loader_takes_the_scored_file_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    rows = score_rows(tmp_path, some_rows(10), tiny_llama)
    dataset = opened(tmp_path / "out.parquet", tokenizer=str(tiny_llama))
    assert len(dataset) == len(rows) == 10
    plain = plainly_scored(tiny_llama, list(dataset))
    for trajectory, row, expected in zip(dataset, rows, plain, strict=True):
        assert trajectory.id == row["id"]
        assert trajectory.input_ids.tolist() == row["input_ids"]
        np.testing.assert_array_equal(
            trajectory.behavior_logprobs, np.array(row["behavior_logprobs"], np.float32)
        )
        np.testing.assert_allclose(trajectory.behavior_logprobs, expected, atol=5e-6)
        assert trajectory.reward == row["reward"]


def test_text_becomes_the_tokens_that_the_loader_would_make_of_it(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [chat_row("hi", "one", "two"), {"prompt": "why", "response": "so"}]
    score_rows(tmp_path, rows, tiny_llama)
    scored = opened(tmp_path / "out.parquet")
    plain = opened(tmp_path / "in.jsonl", behavior=False, tokenizer=str(tiny_llama))
    for mine, theirs in zip(scored, plain, strict=True):
        assert mine.input_ids.tolist() == theirs.input_ids.tolist()
        assert mine.loss_mask.tolist() == theirs.loss_mask.tolist()
    assert np.diff(scored[0].loss_mask.astype(int)).tolist().count(1) == 2  # both assistant turns


def test_output_has_stable_columns_and_remembers_where_rows_came_from(
    tiny_llama: Path, tmp_path: Path
) -> None:
    rows = score_rows(tmp_path, [*some_rows(2), chat_row("q", "a", truncated=True)], tiny_llama)
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert {name: str(schema.field(name).type).split(": ")[-1] for name in schema.names} == {
        "id": "string", "input_ids": "int32>", "loss_mask": "bool>", "behavior_logprobs": "float>",
        "token_weights": "float>", "reward": "double", "temperature": "double", "tokenizer_hash": "string",
        "truncated": "bool", "metadata": "string",
    }  # fmt: skip
    source = str(tmp_path / "in.jsonl")
    assert [json.loads(row["metadata"])["source"] for row in rows] == [f"{source}:{i}" for i in (1, 2, 3)]
    assert json.loads(rows[0]["metadata"])["metadata"] == {"i": 0}
    assert json.loads(rows[1]["metadata"])["messages"][0] == {"role": "user", "content": "hi"}
    assert [row["truncated"] for row in rows] == [None, None, True]
    assert {row["temperature"] for row in rows} == {1.0}


def test_truncated_text_ends_where_the_policy_stopped(tiny_llama: Path, tmp_path: Path) -> None:
    whole, cut = score_rows(
        tmp_path, [chat_row("q", "abc"), chat_row("q", "abc", truncated=True)], tiny_llama
    )
    end = len(whole["loss_mask"]) - whole["loss_mask"][::-1].index(True)
    assert make_byte_tokenizer().convert_ids_to_tokens(whole["input_ids"][end - 1]) == "<|im_end|>"
    assert cut["input_ids"] == whole["input_ids"][: end - 1]
    assert sum(cut["loss_mask"]) == sum(whole["loss_mask"]) - 1


def test_old_log_probs_and_their_temperature_are_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    table = pa.table(
        {
            "input_ids": [[1, 2, 3, 4]],
            "loss_mask": [[False, True, True, True]],
            "behavior_logprobs": pa.array([[0.0, -1.0, -1.0, -1.0]], pa.list_(pa.float16())),
            "temperature": [0.7],
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    run_job(tmp_path / "in.parquet", tmp_path / "out.parquet", tiny_llama)
    (row,) = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert row["temperature"] == 1.0
    assert json.loads(row["metadata"])["temperature"] == 0.7
    assert row["behavior_logprobs"][1] != -1.0


def test_policy_logprobs_stand_beside_the_behaviour_policys(tiny_llama: Path, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other", seed=1)
    data = write_jsonl(tmp_path / "in.jsonl", some_rows(9))
    behavior, policy = tmp_path / "behavior.parquet", tmp_path / "policy.parquet"
    run_job(data, behavior, tiny_llama)
    run_job(behavior, policy, other, write_as="policy")
    before, after = (pq.read_table(path).to_pylist() for path in (behavior, policy))
    trajectories = []
    for old, new in zip(before, after, strict=True):
        for name in ("id", "input_ids", "loss_mask", "behavior_logprobs", "reward"):
            assert new[name] == old[name]
        ids, mask = np.array(new["input_ids"], np.int32), np.array(new["loss_mask"])
        trajectories.append(Trajectory(new["id"], ids, mask, np.zeros(len(ids), np.float32)))
    for new, expected in zip(after, plainly_scored(other, trajectories), strict=True):
        np.testing.assert_allclose(new["policy_logprobs"], expected, atol=5e-6)
    assert len(opened(policy)) == 9  # training ignores the column
    with pytest.raises(DataError, match="missing field 'behavior_logprobs'"):
        run_job(data, tmp_path / "no.parquet", other, write_as="policy")


def test_bad_rows_are_listed_by_file_and_line_before_a_model_is_loaded(
    tmp_path: Path, tiny_llama: Path
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    rows = [
        chat_row("q", ""),
        {"input_ids": [1, 2, 999], "loss_mask": [0, 1, 1]},
        {"input_ids": [1, 2], "loss_mask": [0, 1], "tokenizer_hash": "0123456789abcdef"},
        {"input_ids": list(range(200)), "loss_mask": [0] + [1] * 199},
        {"input_ids": [1, 2], "loss_mask": [0, 1], "rewrad": 1},
        chat_row("q", "fine"),
    ]
    with pytest.raises(DataError) as error:
        score_rows(tmp_path, rows, model)
    said = str(error.value)
    for line, words in (
        (1, "every assistant turn is an empty response"),
        (2, "input_ids[2] = 999 is outside the vocabulary of 258"),
        (3, "tokenizer_hash = '0123456789abcdef'"),
        (4, "200 tokens, over-long: --max-length (default: the model's max_position_embeddings) is 128"),
        (5, "did you mean 'reward'?"),
    ):
        assert f"in.jsonl:{line}: " in said
        assert words in said
    assert error.value.total == 5
    assert not (tmp_path / "out.parquet").exists()


def test_overlong_rows_can_be_dropped(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"id": str(n), "input_ids": [1] * n, "loss_mask": [0] + [1] * (n - 1)} for n in (8, 9, 10)]
    kept = score_rows(tmp_path, rows, tiny_llama, max_length=8, overlong="drop")
    assert [row["id"] for row in kept] == ["8", "9"]  # n tokens take n - 1 positions, as in data.seq_length
    with pytest.raises(DataError, match="no row is left"):
        score_rows(tmp_path, rows, tiny_llama, max_length=2, overlong="drop", overwrite=True)


def test_finished_output_is_kept_and_another_commands_refused(tiny_llama: Path, tmp_path: Path) -> None:
    data, output = write_jsonl(tmp_path / "in.jsonl", some_rows(5)), tmp_path / "out.parquet"
    assert run_job(data, output, tiny_llama)
    written = output.stat().st_mtime_ns
    assert not run_job(data, output, tiny_llama)
    assert output.stat().st_mtime_ns == written
    with pytest.raises(ScoreError, match=r"belongs to another command \(--dtype: fp32 there, bf16 now\)"):
        run_job(data, output, tiny_llama, dtype="bf16")
    other = save_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(ScoreError, match=r"--model: tiny-llama \(\w+\) there, other \(\w+\) now"):
        run_job(data, output, other)
    write_jsonl(data, some_rows(6))
    with pytest.raises(ScoreError, match="--data: "):
        run_job(data, output, tiny_llama)
    assert run_job(data, output, tiny_llama, overwrite=True)
    assert pq.read_metadata(output).num_rows == 6
    output.write_text("mine")
    with pytest.raises(ScoreError, match="exists and `score` did not write it"):
        run_job(data, output, tiny_llama)


def rank_runs_job(rank: int, data: Path, output: Path, model: Path) -> None:
    os.environ["RANK"] = str(rank)
    run_job(data, output, model, backend="megatron")


def test_replicas_share_the_chunks_and_write_the_same_file(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", rows_of_ids(18))
    model = without_tokenizer(tiny_llama, tmp_path / "model")
    for ranks in (1, 2):
        run_ranks(ranks, rank_runs_job, data, tmp_path / f"{ranks}.parquet", model)
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()
    assert not list(tmp_path.glob("*.parts"))


def rank_has_a_model_of_its_own(rank: int, data: Path, output: Path, models: list[Path]) -> str:
    os.environ["RANK"] = str(rank)
    with pytest.raises(RecipeError) as error:
        run_job(data, output, models[rank], backend="megatron")
    return str(error.value)


def test_other_weights_on_one_rank_are_an_error_on_both(tiny_llama: Path, tmp_path: Path) -> None:
    """A node with an old copy would score its share of the rows with another policy."""
    data = write_jsonl(tmp_path / "in.jsonl", rows_of_ids(8))
    models = [without_tokenizer(tiny_llama, tmp_path / str(rank)) for rank in range(2)]
    file = models[1] / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    for said in run_ranks(2, rank_has_a_model_of_its_own, data, tmp_path / "out.parquet", models):
        assert "differs from rank 0: weights in --model" in said
    assert not (tmp_path / "out.parquet").exists()


def rank_meets_bad_data(rank: int, data: Path, output: Path, model: Path) -> str:
    os.environ["RANK"] = str(rank)
    with pytest.raises(DataError) as error:
        run_job(data, output, model)
    return str(error.value)


def test_every_rank_hears_of_bad_data(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", [{"input_ids": [1, 2], "loss_mask": [0, 0]}])
    model = without_tokenizer(tiny_llama, tmp_path / "model")
    first, second = run_ranks(2, rank_meets_bad_data, data, tmp_path / "out.parquet", model)
    assert first == second
    assert "in.jsonl:1: loss_mask is all 0" in first
