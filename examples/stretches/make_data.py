"""Write the data, the problems and the tokenizer of the stretches world.

base.jsonl       25600 trajectories to train the base model on (400 steps of 64, each seen once): stretches are
                 careful with probability 0.9, and the programs use three of the four operations (no x^3)
offline.jsonl     3000 trajectories of the behaviour policy, the offline data of SFT and PEAR: stretches are
                 careful with probability 0.12, and the programs use all four operations
negatives.jsonl   1000 wrong answers of a policy that guesses where a coarse stretch ends, with reward -1
problems.jsonl    4000 problems for RL                       } over all four operations: a prompt and the
heldout.jsonl      300 problems to evaluate on, the same     } values that end the stretches; a grader
                 whatever the seed                           } (.py) stands beside each
tokenizer/       a Hugging Face tokenizer whose tokens are the world's

The first three are training files of pear_megatron: input_ids, loss_mask, behavior_logprobs. Their log-probs are
exact. The same --seed gives the same bytes; each file is complete or absent.

Example:
    python -m examples.stretches.make_data --out outputs/stretches/data --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from examples.stretches import world

GRADER = Path(__file__).with_name("grader.py")
_HELDOUT_SEED = 1_000_003  # of no run: every run is asked the same held-out problems


def trajectory_rows(answers: world.Answers, name: str, reward: float = 1.0) -> Iterator[dict[str, Any]]:
    """Answers as training rows, with ids NAME-000000 on."""
    prompt = [0] * world.PROMPT_LENGTH
    loss_mask = prompt + [1] * world.RESPONSE_LENGTH
    # numpy's tolist gives Python numbers; + 0.0 turns -0.0 into 0.0.
    arrays = (answers.prompts.tolist(), answers.responses.tolist(), (answers.logprobs + 0.0).tolist())
    for i, (prompt_ids, response_ids, logprobs) in enumerate(zip(*arrays, strict=True)):
        yield {
            "id": f"{name}-{i:06d}",
            "input_ids": prompt_ids + response_ids,
            "loss_mask": loss_mask,
            "behavior_logprobs": prompt + logprobs,
            "reward": reward,
        }


def problem_rows(prompts: np.ndarray, name: str) -> Iterator[dict[str, Any]]:
    """Problems as rows of a problem set, with ids NAME-000000 on."""
    for i, (prompt, ends) in enumerate(zip(prompts, world.stretch_ends(prompts), strict=True)):
        yield {"id": f"{name}-{i:06d}", "prompt": world.to_text(prompt), "answer": world.to_text(ends)}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows to ``path``, which appears only when complete; the number of rows."""
    partial = path.with_name(path.name + ".partial")
    count = 0
    with partial.open("w") as file:
        for row in rows:
            file.write(json.dumps(row, separators=(",", ":")) + "\n")
            count += 1
    os.replace(partial, path)
    return count


def save_tokenizer(folder: Path) -> None:
    """A fast tokenizer whose token i is world.TOKENS[i], between white space."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(world.TOKENS)}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token=world.TOKENS[world.END]).save_pretrained(folder)


def make_data(
    out: Path,
    *,
    seed: int,
    careful: float = world.BEHAVIOR_CAREFUL,
    num_base: int = 25_600,
    num_offline: int = 3_000,
    num_negatives: int = 1_000,
    num_problems: int = 4_000,
    num_heldout: int = 300,
) -> dict[Path, int]:
    """Write everything into ``out``: the files of rows, and their numbers of rows."""
    # A generator per file, so that the size of one changes nothing in the others.
    base_rng, offline_rng, problems_rng, negatives_rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(4)
    )
    base = world.sample_answers(
        base_rng, world.sample_problems(base_rng, num_base, world.BASE_OPERATIONS), world.BASE_CAREFUL
    )
    offline = world.sample_answers(offline_rng, world.sample_problems(offline_rng, num_offline), careful)
    # Few guesses are right by chance: a quarter more than are needed is enough to leave them out.
    prompts = world.sample_problems(negatives_rng, num_negatives * 5 // 4)
    guessed = world.sample_guesses(negatives_rng, prompts, careful)
    wrong = guessed[np.flatnonzero(~guessed.right)[:num_negatives]]
    heldout_rng = np.random.default_rng(_HELDOUT_SEED)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("problems", "heldout"):
        shutil.copyfile(GRADER, out / f"{name}.py")
    save_tokenizer(out / "tokenizer")
    files = {
        out / "base.jsonl": trajectory_rows(base, "base"),
        out / "offline.jsonl": trajectory_rows(offline, "offline"),
        out / "negatives.jsonl": trajectory_rows(wrong, "negative", reward=-1.0),
        out / "problems.jsonl": problem_rows(world.sample_problems(problems_rng, num_problems), "problem"),
        out / "heldout.jsonl": problem_rows(world.sample_problems(heldout_rng, num_heldout), "heldout"),
    }
    return {path: write_jsonl(path, rows) for path, rows in files.items()}


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.stretches.make_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything drawn (default: 0)")
    parser.add_argument(
        "--careful",
        type=float,
        default=world.BEHAVIOR_CAREFUL,
        metavar="P",
        help=f"how often the behaviour policy writes a stretch carefully (default: {world.BEHAVIOR_CAREFUL})",
    )
    for name, default in (("base", 25_600), ("offline", 3_000), ("heldout", 300)):
        parser.add_argument(
            f"--num-{name}", type=_count, default=default, metavar="N", help=f"rows of {name}.jsonl"
        )
    parser.add_argument("--show", action="store_true", help="print one trajectory of each policy")
    options = parser.parse_args(argv)
    written = make_data(
        options.out,
        seed=options.seed,
        careful=options.careful,
        num_base=options.num_base,
        num_offline=options.num_offline,
        num_heldout=options.num_heldout,
    )
    for path, count in written.items():
        print(f"{path}: {count} rows")
        if options.show and path.stem in ("base", "offline", "negatives"):
            with path.open() as file:
                ids = np.array(json.loads(file.readline())["input_ids"])
            print(world.render(ids[: world.PROMPT_LENGTH], ids[world.PROMPT_LENGTH :]))


if __name__ == "__main__":
    main()
