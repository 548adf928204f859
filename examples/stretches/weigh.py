"""What a checkpoint of the stretches world says of answers: log-probs, PEAR's weights, the careful share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from examples.stretches import world
from pear_megatron import PearConfig, importance_weights, vocab_parallel_logprob


@torch.no_grad()
def response_logprobs(
    model: Path, trajectories: Path, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the first ``count`` trajectories: log-probs under the model and under the behaviour policy, and tokens.

    Args:
        model: a Hugging Face folder: an export.
        trajectories: a file of make_data.
        count: how many, N.

    Returns:
        three arrays [N, 33].
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with trajectories.open() as file:
        rows = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
    tokens = torch.tensor([row["input_ids"] for row in rows])
    logits = AutoModelForCausalLM.from_pretrained(model)(tokens[:, :-1]).logits  # [N, 65, V]
    logprobs = vocab_parallel_logprob(logits.float().contiguous(), tokens[:, 1:])
    response = slice(world.PROMPT_LENGTH, None)
    behavior = np.array([row["behavior_logprobs"] for row in rows])[:, response]
    return logprobs[:, world.PROMPT_LENGTH - 1 :].numpy(), behavior, tokens[:, response].numpy()


def weigh(logprobs: np.ndarray, behavior_logprobs: np.ndarray, config: PearConfig) -> np.ndarray:
    """PEAR's weights of trajectories [N, 33], as training computes them."""
    count, length = logprobs.shape
    weights, _ = importance_weights(
        torch.from_numpy(logprobs).flatten(),
        torch.from_numpy(behavior_logprobs).flatten(),
        torch.ones(count * length, dtype=torch.bool),
        torch.arange(0, count * length + 1, length),
        config,
    )
    return weights.view(count, length).numpy()


def careful_shares(evaluation: Path) -> np.ndarray:
    """For each problem of an evaluation, the share of its answers' stretches that are careful: [P]."""
    return np.array([world.careful_stretches(answers).mean() for answers in _answers(evaluation).values()])


def ends_right(evaluation: Path, problems: Path) -> tuple[float, float]:
    """What an evaluation's stretches end in: the shares of its careful ones and of its first ones that are right.

    A careful stretch can follow a wrong one; what a first one starts from is given. nan where there are none.

    Args:
        evaluation: its folder.
        problems: the file that it asked, of make_data.
    """
    rows = map(json.loads, problems.read_text().splitlines())
    ends = {row["id"]: [world.TOKENS.index(value) for value in row["answer"].split()] for row in rows}
    answers = _answers(evaluation)
    careful = np.concatenate([world.careful_stretches(symbols) for symbols in answers.values()])  # [N, 4]
    right = np.concatenate(
        [world.at_ends(symbols) == np.array(ends[problem]) for problem, symbols in answers.items()]
    )
    of_careful = float(right[careful].mean()) if careful.any() else float("nan")
    return of_careful, float(right[:, 0].mean())


def _answers(evaluation: Path) -> dict[str, np.ndarray]:
    """Problem -> its answers [K, 33], those cut short filled up with end tokens."""
    by_problem: dict[str, list[list[int]]] = {}
    for line in (evaluation / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        symbols = [*row["tokens"], *[world.END] * world.RESPONSE_LENGTH][: world.RESPONSE_LENGTH]
        by_problem.setdefault(row["id"], []).append(symbols)
    return {problem: np.array(answers) for problem, answers in by_problem.items()}
