"""What ranks do in these tests: load a checkpoint on a layout, run it, hand it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load(folder: Path, tp: int, pp: int, ep: int = 1) -> tuple[Any, Any, Any]:
    from pear_megatron.megatron.checkpoint.load_model import load_for_inference

    return load_for_inference(
        folder, tensor_parallel=tp, pipeline_parallel=pp, expert_parallel=ep, precision="fp32"
    )


def leave() -> None:
    """Ends Megatron's groups and keeps torch.distributed, so that another layout can follow."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def logprobs(
    model: Any, keys: Any, layout: Any, tokens: Tensor, positions: Tensor | None = None, packed: Any = None
) -> Tensor | None:
    """[1, length - 1] log-probs of each next token, through Megatron's own schedule; None off the last stage.

    Args:
        positions: of each token, where the row is ``packed``, Megatron-Core's PackedSeqParams.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from pear_megatron import vocab_parallel_logprob

    length = tokens.shape[1]
    causal = None if packed else torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    positions = torch.arange(length)[None] if positions is None else positions

    def step(iterator: Any, model: Any) -> Any:
        output = model(tokens, positions, causal, packed_seq_params=packed)

        def score(logits: Tensor) -> Any:
            found = vocab_parallel_logprob(
                logits[:, :-1], tokens[:, 1:], tp_group=layout.tp_group, vocab_size=keys.vocab_size
            )
            return found.sum(), torch.tensor(1), {"logprobs": found}

        return output, score

    with torch.inference_mode():
        results = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([None]),
            model=[model],
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=1,
            forward_only=True,
        )
    return results[0]["logprobs"].clone() if layout.is_last_stage else None


def rank_logprobs(
    rank: int, cases: dict[str, tuple[Path, Tensor]], layouts: list[tuple[int, ...]]
) -> dict[tuple[Any, ...], Tensor | None]:
    """Log-probs of every case on every layout (TP, PP, and EP where given), in one world."""
    found = {}
    for sizes in layouts:
        for name, (folder, tokens) in cases.items():
            model, keys, layout = load(folder, *sizes)
            found[(name, *sizes)] = logprobs(model, keys, layout, tokens)
            leave()
    return found


def rank_convert(rank: int, cases: dict[str, Path], output: Path, tp: int, pp: int, ep: int = 1) -> None:
    """Converts every case into ``output / name``."""
    from pear_megatron.megatron.checkpoint.convert import convert_checkpoint

    for name, folder in cases.items():
        convert_checkpoint(
            folder, output / name, tensor_parallel=tp, pipeline_parallel=pp, expert_parallel=ep
        )
        leave()


def rank_train(rank: int, recipe_file: Path, runs: list[list[str]]) -> list[str]:
    """Trains one run after the other in one world -> the error of each, or nothing."""
    import logging

    from pear_megatron.errors import PearError
    from pear_megatron.megatron.layout import initialize
    from pear_megatron.recipe import load_recipe
    from pear_megatron.train.trainer import Trainer

    logging.disable(logging.WARNING)
    outcomes = []
    for overrides in runs:
        try:
            recipe = load_recipe(recipe_file, overrides)
            Trainer(recipe, initialize(recipe.model, recipe.parallel, recipe.train)).train()
            outcomes.append("")
        except PearError as error:
            outcomes.append(f"{type(error).__name__}: {error}")
        leave()
    return outcomes
