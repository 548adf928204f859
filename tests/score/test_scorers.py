"""What a scorer says of a trajectory is what the model says of its tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pear_megatron.data import Trajectory
from pear_megatron.errors import ScoreError
from pear_megatron.score.backends import choose_backend, load_scorer
from pear_megatron.score.batches import length_batches
from tests.distributed import run_ranks
from tests.score.tiny import plainly_scored, save_tiny_llama, some_trajectories

Layout = tuple[int, int]


def assert_scores(mine: list[np.ndarray], plain: list[np.ndarray], atol: float = 5e-6) -> None:
    for scored, expected in zip(mine, plain, strict=True):
        assert scored.dtype == np.float32
        np.testing.assert_allclose(scored, expected, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("max_tokens", [None, 50])
def test_transformers_backend_equals_transformers_token_by_token(
    tiny_llama: Path, max_tokens: int | None
) -> None:
    trajectories = some_trajectories()
    scorer = load_scorer(tiny_llama, backend="hf", max_tokens_per_batch=max_tokens)
    assert_scores(scorer(trajectories)[0], plainly_scored(tiny_llama, trajectories))


def rank_scores(
    rank: int, folder: Path, trajectories: list[Trajectory], layouts: list[Layout]
) -> dict[Layout, tuple[int, int, list[np.ndarray]]]:
    """Layout -> (replica, number of replicas, scores) of this rank."""
    from megatron.core import parallel_state

    found = {}
    for tp, pp in layouts:
        scorer = load_scorer(folder, tensor_parallel=tp, pipeline_parallel=pp, max_tokens_per_batch=90)
        found[tp, pp] = scorer.replica, scorer.num_replicas, scorer(trajectories)[0]
        parallel_state.destroy_model_parallel()
    return found


def test_megatron_backend_equals_transformers_on_every_rank_of_every_layout(tiny_llama: Path) -> None:
    trajectories = some_trajectories()
    plain = plainly_scored(tiny_llama, trajectories)
    ranks = run_ranks(2, rank_scores, tiny_llama, trajectories, [(2, 1), (1, 2), (1, 1)])
    for rank, found in enumerate(ranks):
        for scores in (entry[-1] for entry in found.values()):
            assert_scores(scores, plain)
        assert found[2, 1][:2] == found[1, 2][:2] == (0, 1)
        assert found[1, 1][:2] == (rank, 2)  # data parallel


def test_smollm2_scores_as_transformers_says_on_both_backends(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    trajectories = []
    for name, text in (("a", "The capital of France is Paris."), ("b", "2, 4, 6, 8, 10, 12 and so on")):
        ids = np.array(tokenizer(text)["input_ids"], dtype=np.int32)
        mask = np.arange(len(ids)) >= 2
        trajectories.append(Trajectory(name, ids, mask, np.zeros(len(ids), dtype=np.float32)))
    plain = plainly_scored(smollm2, trajectories)
    assert -4 < plain[0][plain[0] != 0].mean() < -0.5  # it knows
    assert_scores(load_scorer(smollm2, backend="hf")(trajectories)[0], plain, atol=2e-4)
    (found,) = run_ranks(1, rank_scores, smollm2, trajectories, [(1, 1)])
    assert_scores(found[1, 1][2], plain, atol=2e-4)


def test_length_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = [5, 90, 7, 6, 5, 40, 41]
    batches = length_batches(lengths, 82)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert batches[0] == [1]  # longer than the budget: alone
    for batch in batches[1:]:
        assert len(batch) * max(lengths[i] for i in batch) <= 82


def test_log_probs_that_are_not_finite_name_the_rows(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    model.save_pretrained(tmp_path)
    first, second = some_trajectories(2, longest=8)
    first.input_ids[:] = 3
    second.input_ids[0] = 7
    with pytest.raises(ScoreError, match=r"not finite to t1; score with --dtype fp32"):
        load_scorer(tmp_path, backend="hf")([first, second])


def test_backend_is_megatron_where_it_has_the_architecture_and_hf_elsewhere(
    tiny_llama: Path, tmp_path: Path
) -> None:
    assert choose_backend(tiny_llama)[0] == "megatron"
    biased = save_tiny_llama(tmp_path / "biased", attention_bias=True)
    backend, why = choose_backend(biased)
    assert backend == "hf"
    assert "attention_bias" in why
    trajectories = some_trajectories(3)
    assert_scores(load_scorer(biased)(trajectories)[0], plainly_scored(biased, trajectories))
    with pytest.raises(ScoreError, match="no such folder"):
        choose_backend(tmp_path / "absent")
    with pytest.raises(ScoreError, match=r"expected a Hugging Face checkpoint \(config.json\)"):
        choose_backend(tmp_path)


def test_hf_backend_refuses_to_split_a_model_over_ranks(tiny_llama: Path) -> None:
    with pytest.raises(ScoreError, match="no tensor or pipeline parallelism"):
        load_scorer(tiny_llama, backend="hf", tensor_parallel=2)
