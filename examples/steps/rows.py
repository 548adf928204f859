"""Files of the steps world: trajectories, problems and the tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from examples.steps import world
from pear_megatron.storage import write_atomically

_IDS = {token: i for i, token in enumerate(world.TOKENS)}


def trajectory(name: str, prompt: str, solution: str, reward: float = 1.0) -> dict[str, Any]:
    """A training row; the end of the solution is trained on too."""
    ids = [_IDS[character] for character in prompt + solution] + [world.END]
    mask = [0] * len(prompt) + [1] * (len(solution) + 1)
    return {"id": name, "input_ids": ids, "loss_mask": mask, "reward": reward}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSONL, complete or absent."""
    write_atomically(path, "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What ``write_rows`` and ``pear-megatron eval`` write."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def is_made(output: Path, settings: Mapping[str, Any]) -> bool:
    """Whether ``mark_made`` was called for this folder; SystemExit if that was with other settings."""
    done = output / "settings.json"
    if not done.exists():
        return False
    if (found := done.read_text()) != (wanted := json.dumps(settings)):
        raise SystemExit(
            f"error: {output} holds what was made with {found}, and {wanted} is asked for; "
            "choose another --output, or remove that folder"
        )
    return True


def mark_made(output: Path, settings: Mapping[str, Any]) -> None:
    """The last step of making a folder."""
    write_atomically(output / "settings.json", json.dumps(settings))


def write_problems(path: Path, problems: Iterable[world.Problem]) -> None:
    """A problem set, and its grader beside it (.py)."""
    write_rows(
        path,
        (
            {"id": f"{path.stem}-{i:05d}", "prompt": p.prompt, "answer": p.answer}
            for i, p in enumerate(problems)
        ),
    )
    shutil.copyfile(Path(__file__).with_name("grader.py"), path.with_suffix(".py"))


def save_tokenizer(folder: Path) -> None:
    """A fast tokenizer with a token for each character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(_IDS))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    end = world.TOKENS[world.END]
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end).save_pretrained(folder)
