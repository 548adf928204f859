"""TransformersScorer: Hugging Face transformers, for models that Megatron-Core does not have."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pear_megatron.data.topk import TopK
from pear_megatron.data.trajectory import Trajectory
from pear_megatron.errors import ScoreError
from pear_megatron.ops.statistics import vocab_parallel_logprob
from pear_megatron.score.batches import in_place, length_batches, right_padded, topk_in_place
from pear_megatron.score.ranks import world_size
from pear_megatron.score.top_tokens import top_tokens

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class TransformersScorer:
    """A Scorer on a causal language model of transformers: see ``backends.load_scorer``.

    Under torchrun every process holds a whole copy on its own GPU; a single process takes all GPUs there
    are (``device_map="auto"``).
    """

    backend = "hf"
    writes = True

    def __init__(self, model: str | Path, dtype: str, max_tokens_per_batch: int) -> None:
        self.replica = int(os.environ.get("RANK", "0"))
        self.num_replicas = world_size()
        self._max_tokens = max_tokens_per_batch
        self._model = _load(Path(model), _DTYPES[dtype], alone=self.num_replicas == 1).eval()

    @torch.no_grad()
    def __call__(
        self, trajectories: Sequence[Trajectory], top_k: int = 0, *, on_tokens: Callable[[int], object] = int
    ) -> tuple[list[np.ndarray], list[TopK]]:
        """See Scorer."""
        batches = length_batches([len(t.input_ids) for t in trajectories], self._max_tokens)
        logprobs, entries = [], []
        for batch in batches:
            rows, *top = self._score(trajectories, batch, top_k)
            logprobs.append(rows)
            entries.append(top)
            on_tokens(sum(len(trajectories[i].input_ids) for i in batch))
        scored = in_place(trajectories, batches, logprobs)
        return scored, topk_in_place(trajectories, batches, entries) if top_k else []

    def _score(
        self, trajectories: Sequence[Trajectory], batch: Sequence[int], top_k: int
    ) -> list[np.ndarray]:
        """[B, S] log-probs and, of top_k > 0, what ``top_tokens`` returns."""
        packed = right_padded(trajectories, batch).to(self._model.device)
        # No attention mask: causal attention never looks at what stands to the right.
        logits = self._model(input_ids=packed.tokens, use_cache=False).logits  # [B, S, V]
        packed = packed.to(logits.device)
        logprobs = vocab_parallel_logprob(logits, packed.labels, mask=packed.loss_mask)  # [B, S] float32
        found = [logprobs, *(top_tokens(logits, packed, logprobs, top_k) if top_k else ())]
        return [tensor.cpu().numpy() for tensor in found]


def _load(folder: Path, dtype: torch.dtype, *, alone: bool) -> Any:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise ScoreError("the hf backend needs transformers; pip install 'pear-megatron[hf]'") from error
    logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if not (folder / "config.json").is_file():
        gguf = sorted(folder.glob("*.gguf"))
        if len(gguf) != 1:
            raise ScoreError(
                f"{folder} has no config.json and {len(gguf)} .gguf files; name a model's folder"
            )
        options["gguf_file"] = gguf[0].name
    else:
        options["use_safetensors"] = True  # no pickles
    spread = alone and torch.cuda.device_count() > 1 and importlib.util.find_spec("accelerate") is not None
    if spread:
        options["device_map"] = "auto"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(str(folder), **options)
    except (OSError, ValueError, ImportError) as error:
        raise ScoreError(f"{folder} cannot be loaded with transformers: {error}") from error
    if spread or not torch.cuda.is_available():
        return model
    return model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
