"""`score --top-k` and `--as reference`: the likeliest tokens as transformers has them, on every layout, and kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pear_megatron import PearConfig
from pear_megatron.data import DataError, Trajectory
from pear_megatron.data.columns import Columns, needs_behavior_logprobs
from pear_megatron.data.topk import TopK
from pear_megatron.errors import ScoreError
from pear_megatron.score.backends import load_scorer
from tests.distributed import run_ranks
from tests.score.jobs import chat_row, opened, rows_of_ids, run_job, score_rows, some_rows, write_jsonl
from tests.score.tiny import plainly_scored, save_tiny_llama, some_trajectories

Layout = tuple[int, int]
K = 5


def plain_entries(folder: Path, trajectories: list[Trajectory], k: int) -> list[list[dict[int, float]]]:
    """Of every decision {id: log-prob}: torch.topk of transformers' float32 log-softmax, and its own token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for trajectory in trajectories:
        ids = torch.tensor(trajectory.input_ids, dtype=torch.int64)
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)  # [n, V]
        rows = []
        for i in np.flatnonzero(trajectory.loss_mask):
            top = logprobs[i - 1].topk(k)
            entries = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            rows.append(entries | {int(ids[i]): float(logprobs[i - 1, ids[i]])})
        found.append(rows)
    return found


def assert_entries(mine: list[TopK], plain: list[list[dict[int, float]]]) -> None:
    for topk, rows in zip(mine, plain, strict=True):
        ids, logprobs = topk.padded(K + 1)
        assert len(ids) == len(rows)
        for i, v, expected in zip(ids, logprobs, rows, strict=True):
            found = dict(zip(i[i >= 0].tolist(), v[i >= 0].tolist(), strict=True))
            assert found.keys() == expected.keys()
            assert found == pytest.approx(expected, abs=5e-6, rel=1e-5)


def rank_entries(
    rank: int, folder: Path, trajectories: list[Trajectory], layouts: list[Layout]
) -> dict[Layout, tuple[list[np.ndarray], list[TopK]]]:
    from megatron.core import parallel_state

    found = {}
    for tp, pp in layouts:
        scorer = load_scorer(folder, tensor_parallel=tp, pipeline_parallel=pp, max_tokens_per_batch=90)
        found[tp, pp] = scorer(trajectories, K)
        parallel_state.destroy_model_parallel()
    return found


def test_entries_are_torch_topk_of_transformers_on_both_backends_and_every_layout(tiny_llama: Path) -> None:
    trajectories = some_trajectories()
    plain = plain_entries(tiny_llama, trajectories, K)
    assert {len(entries) for rows in plain for entries in rows} == {K, K + 1}
    scorer = load_scorer(tiny_llama, backend="hf", max_tokens_per_batch=90)
    assert_entries(scorer(trajectories, K)[1], plain)
    # 258 tokens are padded to 384 columns at TP 2: the second rank's last columns are no tokens.
    for found in run_ranks(2, rank_entries, tiny_llama, trajectories, [(2, 1), (1, 2), (1, 1)]):
        for logprobs, topk in found.values():
            assert_entries(topk, plain)
            for trajectory, scored, own in zip(trajectories, logprobs, topk, strict=True):
                ids, values = own.padded(K + 1)
                sampled = ids == trajectory.input_ids[trajectory.loss_mask][:, None]
                np.testing.assert_array_equal(values[sampled], scored[trajectory.loss_mask])  # exactly


def test_k_may_exceed_the_vocabulary_of_a_rank(tiny_llama: Path, tmp_path: Path) -> None:
    small = save_tiny_llama(tmp_path / "small", vocab_size=3)
    (trajectory,) = some_trajectories(1)
    trajectory.input_ids[:] %= 3
    # The second rank has padding alone.
    (found, _) = run_ranks(2, rank_entries, small, [trajectory], [(2, 1)])
    (topk,) = found[2, 1][1]
    assert set(topk.counts) == {3}
    np.testing.assert_allclose(
        np.add.reduceat(np.exp(topk.logprobs), np.arange(0, len(topk.ids), 3)), 1, atol=1e-5
    )


def test_training_takes_the_file_with_its_entries(tiny_llama: Path, tmp_path: Path) -> None:
    rows = score_rows(tmp_path, some_rows(10), tiny_llama, top_k=K)
    assert list(rows[0])[3:6] == ["behavior_logprobs", "behavior_topk_ids", "behavior_topk_logprobs"]
    dataset = opened(tmp_path / "out.parquet", columns=Columns.of(PearConfig(base_loss="kl")))
    assert dataset.meta["topk_width"] == K + 1
    assert_entries(
        [t.behavior_topk for t in dataset if t.behavior_topk], plain_entries(tiny_llama, list(dataset), K)
    )
    for row in rows:
        assert [bool(ids) for ids in row["behavior_topk_ids"]] == row["loss_mask"]


def test_a_killed_job_goes_on_to_the_same_bytes_and_another_k_is_another_job(
    tiny_llama: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", rows_of_ids(10))
    whole, cut = tmp_path / "whole.parquet", tmp_path / "cut.parquet"
    run_job(data, whole, tiny_llama, top_k=K)

    from pear_megatron.score.run import ScoreJob
    from tests.score.jobs import settings

    job = ScoreJob(settings(data, cut, tiny_llama, top_k=K))
    assert not job.prepare()
    # The second chunk, then the process dies.
    job._score([1], [chunk.tokens for chunk in job._work.read_index()[0]])
    assert job.num_missing() == 2
    with pytest.raises(ScoreError, match="--top-k: 5 there, 3 now"):
        run_job(data, cut, tiny_llama, top_k=3)
    run_job(data, cut, tiny_llama, top_k=K)
    assert cut.read_bytes() == whole.read_bytes()


def test_reference_goes_beside_what_is_there_and_replaces_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    score_rows(tmp_path, some_rows(6), tiny_llama, top_k=K)
    other = save_tiny_llama(tmp_path / "other", seed=1)
    scored, both = tmp_path / "out.parquet", tmp_path / "both.parquet"
    run_job(scored, both, other, write_as="reference")
    before, after = (pq.read_table(path) for path in (scored, both))
    kept = ("input_ids", "behavior_logprobs", "behavior_topk_ids", "behavior_topk_logprobs")
    assert all(before[name].equals(after[name]) for name in kept)
    dataset = opened(both)
    for trajectory, plain in zip(dataset, plainly_scored(other, list(dataset)), strict=True):
        np.testing.assert_allclose(trajectory.reference_logprobs, plain, atol=5e-6)
    with pytest.raises(DataError, match="reference_logprobs is there already"):
        run_job(both, tmp_path / "again.parquet", tiny_llama, write_as="reference")
    run_job(both, tmp_path / "policy.parquet", tiny_llama, write_as="policy")
    names = pq.read_schema(tmp_path / "policy.parquet").names
    assert {*kept, "reference_logprobs", "policy_logprobs"} <= set(names)


def test_reference_needs_no_behavior_log_probs_but_all_rows_alike(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [row | {"temperature": 0.7} for row in rows_of_ids(3)]  # whatever wrote them
    written = score_rows(tmp_path, rows, tiny_llama, write_as="reference")
    assert "behavior_logprobs" not in written[0]
    ratios = PearConfig(ratio="reference")
    needs = {"behavior": needs_behavior_logprobs(ratios), "columns": Columns.of(ratios)}
    dataset = opened(tmp_path / "out.parquet", **needs)
    for trajectory, plain in zip(dataset, plainly_scored(tiny_llama, list(dataset)), strict=True):
        np.testing.assert_allclose(trajectory.reference_logprobs, plain, atol=5e-6)
    own = [-1.0] * len(rows[1]["input_ids"])
    mixed = write_jsonl(
        tmp_path / "mixed.jsonl", [rows[0], {**rows[1], "behavior_logprobs": own, "temperature": 1}]
    )
    with pytest.raises(DataError, match="behavior_logprobs is in some rows and not in others"):
        run_job(mixed, tmp_path / "mixed.parquet", tiny_llama, write_as="reference")
    warm = write_jsonl(tmp_path / "warm.jsonl", [{**rows[1], "behavior_logprobs": own}])
    with pytest.raises(
        DataError, match=r"temperature = 0\.7: behavior_logprobs must be those .* at temperature 1"
    ):
        run_job(warm, tmp_path / "warm.parquet", tiny_llama, write_as="reference")


def test_new_log_probs_take_old_entries_away_and_keep_the_reference(tiny_llama: Path, tmp_path: Path) -> None:
    first = score_rows(tmp_path, [chat_row("q", "abc")], tiny_llama, top_k=K)
    rows: list[dict[str, Any]] = [
        {**first[0], "reference_logprobs": first[0]["behavior_logprobs"], "metadata": None}
    ]
    other = save_tiny_llama(tmp_path / "other", seed=1)
    os.remove(tmp_path / "out.parquet")
    (again,) = score_rows(tmp_path, rows, other)
    assert "behavior_topk_ids" not in again
    assert again["reference_logprobs"] == rows[0]["reference_logprobs"]
    assert again["behavior_logprobs"] != rows[0]["behavior_logprobs"]
