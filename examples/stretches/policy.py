"""The trained model as a policy: its first checkpoint, its answers, its log-probs.

python -m examples.stretches.policy init --recipe recipes/sft/stretches_base.yaml --output DIR
python -m examples.stretches.policy answer --run RUN --problems heldout.jsonl --output FILE.npz
python -m examples.stretches.policy score --run RUN --trajectories offline.jsonl --output FILE.npz
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.stretches import world
from examples.stretches.make_data import read_problems
from examples.stretches.model import shared_position_embedding


def _next_token_logits(model: Any, tokens: Tensor, vocab_size: int) -> Tensor:
    """[B, S] -> [B, S, vocab_size] float32."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)[None, None]
    return model(tokens, positions, causal)[..., :vocab_size].float()


def init(recipe_path: Path, output: Path) -> None:
    """Writes a run's folder whose checkpoint is the untrained model with shared position vectors."""
    from pear_megatron.hf.assets import write_model_files
    from pear_megatron.megatron.load import new_model
    from pear_megatron.megatron.saver import save_model
    from pear_megatron.recipe import load_recipe, to_yaml

    recipe = load_recipe(recipe_path)
    model, layout = new_model(recipe)
    table = model.embedding.position_embeddings.weight
    with torch.no_grad():
        table.copy_(shared_position_embedding(table))
    shutil.rmtree(output, ignore_errors=True)
    save_model(output / "checkpoints", 0, layout, model)
    write_model_files(output, recipe.model, recipe.train.precision, source=None)
    (output / "config.yaml").write_text(to_yaml(recipe))


@torch.no_grad()
def answer(run: Path, problems: Path, samples: int, seed: int) -> dict[str, np.ndarray]:
    """Samples answers at temperature 1: prompts [P, 33], responses [P, samples, 33]."""
    from pear_megatron.megatron.load import load_run

    model, recipe = load_run(run)
    _, prompts = read_problems(problems)
    tokens = torch.from_numpy(prompts).repeat_interleave(samples, dim=0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(world.RESPONSE_LENGTH):
        last = torch.cat(
            [_next_token_logits(model, part, recipe.model.vocab_size)[:, -1] for part in tokens.split(600)]
        )
        tokens = torch.cat([tokens, torch.multinomial(last.softmax(-1), 1, generator=generator)], dim=1)
    responses = tokens[:, world.PROMPT_LENGTH :].view(len(prompts), samples, world.RESPONSE_LENGTH)
    return {"prompts": prompts, "responses": responses.numpy()}


@torch.no_grad()
def score(run: Path, trajectories: Path, count: int) -> dict[str, np.ndarray]:
    """Log-probs [N, 33] of the first ``count`` trajectories' responses under the run's model and the data's."""
    from pear_megatron import vocab_parallel_logprob
    from pear_megatron.megatron.load import load_run

    model, recipe = load_run(run)
    with trajectories.open() as file:
        rows = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
    tokens = torch.tensor([row["input_ids"] for row in rows])
    logits = _next_token_logits(model, tokens[:, :-1], recipe.model.vocab_size)
    logprobs = vocab_parallel_logprob(logits.contiguous(), tokens[:, 1:])
    response = slice(world.PROMPT_LENGTH - 1, None)
    behavior = np.array([row["behavior_logprobs"] for row in rows])[:, world.PROMPT_LENGTH :]
    return {
        "logprobs": logprobs[:, response].numpy(),
        "behavior_logprobs": behavior,
        "responses": tokens[:, world.PROMPT_LENGTH :].numpy(),
    }


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    partial = path.with_name(f".{path.name}.partial.npz")
    np.savez(partial, **arrays)  # type: ignore[arg-type]
    os.replace(partial, path)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.stretches.policy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("init", "answer", "score"):
        command = commands.add_parser(name)
        command.add_argument("--output", type=Path, required=True)
        if name == "init":
            command.add_argument("--recipe", type=Path, required=True)
        else:
            command.add_argument("--run", type=Path, required=True)
        if name == "answer":
            command.add_argument("--problems", type=Path, required=True)
            command.add_argument("--samples", type=int, default=8)
            command.add_argument("--seed", type=int, default=0)
        if name == "score":
            command.add_argument("--trajectories", type=Path, required=True)
            command.add_argument("--count", type=int, default=512)
    args = parser.parse_args(arguments)

    from pear_megatron.megatron import layout

    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.command == "init":
        init(args.recipe, args.output)
    elif args.command == "answer":
        _write(args.output, answer(args.run, args.problems, args.samples, args.seed))
    else:
        _write(args.output, score(args.run, args.trajectories, args.count))
    layout.shutdown()


if __name__ == "__main__":
    main()
