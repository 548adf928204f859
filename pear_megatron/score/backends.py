"""load_scorer: log-probs of trajectories under a model, on Megatron-Core or on Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from pear_megatron.data.topk import TopK
from pear_megatron.data.trajectory import Trajectory
from pear_megatron.errors import RecipeError, ScoreError

BACKENDS = ("megatron", "hf")


class Scorer(Protocol):
    """Log-probs of trajectories' tokens, at temperature 1, log-softmax in float32.

    All ranks of a replica (tensor x pipeline parallel) call it with the same trajectories and get the same
    answer; replicas call it with different ones.

    Attributes:
        backend: ``megatron`` or ``hf``.
        replica: which of the data-parallel copies of the model this process belongs to.
        num_replicas: how many there are.
        writes: whether this process is the one of its replica that writes and reports.
    """

    backend: str
    replica: int
    num_replicas: int
    writes: bool

    def __call__(
        self, trajectories: Sequence[Trajectory], top_k: int = 0, *, on_tokens: Callable[[int], object] = int
    ) -> tuple[list[np.ndarray], list[TopK]]:
        """Scores trajectories of n tokens each; their ``behavior_logprobs`` are not looked at.

        Args:
            trajectories: any number of them; they are put into batches by length here.
            top_k: how many of each decision's likeliest tokens to return; 0 = none.
            on_tokens: called after each forward pass with the number of tokens it took, for progress.

        Returns:
            A float32 [n] per trajectory, aligned with ``input_ids`` (not shifted): entry i is
            log p(input_ids[i] | input_ids[:i]) on decisions, 0 elsewhere. And with ``top_k`` each trajectory's
            likeliest tokens, beside them the one that is there, with exactly the log-prob that is returned.

        Raises:
            ScoreError: a log-prob is not finite; names the trajectories.
        """


def load_scorer(
    model: str | Path,
    *,
    backend: str | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    dtype: str | None = None,
    max_tokens_per_batch: int | None = None,
) -> Scorer:
    """Loads a model to score trajectories with.

    With the megatron backend and more than one rank, every rank of the torchrun world calls this.

    Args:
        model: a Hugging Face folder, a run's folder or a Megatron-Core checkpoint.
        backend: ``megatron`` or ``hf``; None takes what ``choose_backend`` says.
        tensor_parallel, pipeline_parallel: sizes of a replica; the hf backend knows 1 x 1 only and spreads
            a model over the GPUs of a single process by itself.
        dtype: ``bf16`` or ``fp32``; None = bf16 on a GPU, fp32 without.
        max_tokens_per_batch: rows x longest row of a forward pass; None = 16384 on a GPU, 2048 without.

    Raises:
        ScoreError, RecipeError, CheckpointError: the model cannot be loaded.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    backend = backend or choose_backend(model)[0]
    dtype = dtype or ("bf16" if on_gpu else "fp32")
    budget = max_tokens_per_batch or (16384 if on_gpu else 2048)
    if backend == "megatron":
        from pear_megatron.score.megatron_scorer import MegatronScorer

        return MegatronScorer(model, tensor_parallel, pipeline_parallel, dtype, budget)
    if backend != "hf":
        raise ScoreError(f"backend {backend!r} is unknown; choose {' or '.join(BACKENDS)}")
    refuse_to_split(backend, tensor_parallel * pipeline_parallel)
    from pear_megatron.score.transformers_scorer import TransformersScorer

    return TransformersScorer(model, dtype, budget)


def refuse_to_split(backend: str, ranks: int) -> None:
    """ScoreError where a backend cannot split a model over ranks and is asked to."""
    if backend == "hf" and ranks > 1:
        raise ScoreError(
            "the hf backend has no tensor or pipeline parallelism; leave --tensor-parallel and "
            "--pipeline-parallel at 1: one process spreads the model over all its GPUs (device_map, needs "
            "accelerate), and torchrun with N processes scores with N copies"
        )


def choose_backend(model: str | Path) -> tuple[str, str]:
    """(backend, why): megatron where this package can load the model into Megatron-Core, else hf."""
    folder = Path(model)
    if not folder.is_dir():
        raise ScoreError(
            f"no model at {folder}: no such folder; download one first: hf download NAME --local-dir {folder}"
        )
    if (folder / "config.json").is_file():
        from pear_megatron.recipe.hf_config import model_keys

        try:
            model_keys(folder)
        except RecipeError as error:
            return "hf", f"not supported on Megatron-Core: {error}"
        return "megatron", "a Hugging Face checkpoint that Megatron-Core can load"
    from pear_megatron.megatron.checkpoint.model_folder import is_megatron_checkpoint

    if is_megatron_checkpoint(folder):
        return "megatron", "a Megatron-Core checkpoint"
    if len(list(folder.glob("*.gguf"))) == 1:
        return "hf", "a .gguf file"
    raise ScoreError(
        f"no model at {folder}: expected a Hugging Face checkpoint (config.json), a run's output_dir or the output "
        "of `pear-megatron convert` (model.yaml)"
    )
