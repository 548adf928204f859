"""Write the data of the stretches world.

base.jsonl     25600 trajectories to train the base model on (400 steps of 64, each seen once): stretches are
               careful with probability 0.9, and the programs use three of the four operations (no x^3)
offline.jsonl   3000 trajectories of the behaviour policy, the offline data of SFT and PEAR: stretches are
               careful with probability 0.12, and the programs use all four operations
heldout.jsonl    300 problems over all four operations, to evaluate on: {"id", "prompt_ids"}

base.jsonl and offline.jsonl are training files of pear_megatron: input_ids, loss_mask, behavior_logprobs. Their
log-probs are exact. The same --seed gives the same bytes; each file is complete or absent.

Example:
    python -m examples.stretches.make_data --out outputs/stretches/data --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from examples.stretches import world


def trajectory_rows(answers: world.Answers, name: str) -> Iterator[dict[str, Any]]:
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
        }


def problem_rows(prompts: np.ndarray, name: str) -> Iterator[dict[str, Any]]:
    """Problems as rows, with ids NAME-000000 on."""
    for i, prompt_ids in enumerate(prompts.tolist()):
        yield {"id": f"{name}-{i:06d}", "prompt_ids": prompt_ids}


def read_problems(path: str | Path) -> tuple[list[str], np.ndarray]:
    """What problem_rows wrote: ids, and prompts [N, 33]."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [row["id"] for row in rows], np.array([row["prompt_ids"] for row in rows])


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


def make_data(out: Path, *, seed: int, num_base: int, num_offline: int, num_heldout: int) -> dict[Path, int]:
    """Write the three files into ``out``: their paths and numbers of rows."""
    # A generator per file, so that the size of one changes nothing in the others.
    base_rng, offline_rng, heldout_rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)
    )
    base = world.sample_answers(
        base_rng, world.sample_problems(base_rng, num_base, world.BASE_OPERATIONS), world.BASE_CAREFUL
    )
    offline = world.sample_answers(
        offline_rng, world.sample_problems(offline_rng, num_offline), world.BEHAVIOR_CAREFUL
    )
    heldout = world.sample_problems(heldout_rng, num_heldout)
    out.mkdir(parents=True, exist_ok=True)
    files = {
        out / "base.jsonl": trajectory_rows(base, "base"),
        out / "offline.jsonl": trajectory_rows(offline, "offline"),
        out / "heldout.jsonl": problem_rows(heldout, "heldout"),
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
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the three files")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything drawn (default: 0)")
    parser.add_argument("--num-base", type=_count, default=25600, metavar="N", help="rows of base.jsonl")
    parser.add_argument("--num-offline", type=_count, default=3000, metavar="N", help="rows of offline.jsonl")
    parser.add_argument("--num-heldout", type=_count, default=300, metavar="N", help="rows of heldout.jsonl")
    parser.add_argument("--show", action="store_true", help="print one trajectory of each policy")
    options = parser.parse_args(argv)
    written = make_data(
        options.out,
        seed=options.seed,
        num_base=options.num_base,
        num_offline=options.num_offline,
        num_heldout=options.num_heldout,
    )
    for path, count in written.items():
        print(f"{path}: {count} rows")
        if options.show and path.name != "heldout.jsonl":
            with path.open() as file:
                ids = np.array(json.loads(file.readline())["input_ids"])
            print(world.render(ids[: world.PROMPT_LENGTH], ids[world.PROMPT_LENGTH :]))


if __name__ == "__main__":
    main()
