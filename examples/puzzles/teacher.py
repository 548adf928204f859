"""What the comparison on real text starts from (recipes/compare/puzzles.yaml): a teacher's right answers, scored by it.

SmolLM2-135M-Instruct, taught on solved puzzles by plain SFT, is the teacher. It answers other puzzles at temperature
1; its right answers, with its own log-probs, are the offline data for SmolLM2-135M-Instruct as it was. That is how
PEAR's data come about in practice: a stronger policy's samples, whose log-probs are known.

    smollm2/           where the arms start from
    teacher/           the teacher as a Hugging Face folder
    scored.parquet     the offline data

Example:
    python -m examples.puzzles.teacher --output results/teacher --seed 0
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from examples.launch import RECIPES, announce, command, train
from examples.puzzles import problems
from examples.puzzles.smollm2 import make_folder
from pear_megatron.problems.load import load_problems
from pear_megatron.storage import write_atomically


def write_right_answers(samples: Path, asked: Path, output: Path) -> int:
    """Dialogues of the samples that were graded right; how many.

    Args:
        samples: samples.jsonl of an evaluation.
        asked: the problem set that it asked, as YAML.
        output: JSONL with ``id`` and ``messages``.
    """
    from pear_megatron.problems.load import read_problems_config

    by_id = {problem.id: problem for problem in load_problems(read_problems_config(str(asked)))}
    rows = []
    for line in samples.read_text().splitlines():
        row = json.loads(line)
        if row["score"] >= 1.0 and not row["truncated"]:
            answer = {"role": "assistant", "content": row["response"].strip()}
            messages = [*by_id[row["id"]].prompt, answer]
            rows.append(json.dumps({"id": f"{row['id']}/{row['sample']}", "messages": messages}) + "\n")
    write_atomically(output, "".join(rows))
    return len(rows)


def make(output: Path, *, seed: int, num_puzzles: int, steps: int, num_samples: int) -> None:
    """Every step whose result is not there yet."""
    base, solved, asked = output / "smollm2", output / "solved.jsonl", output / "asked.yaml"
    output.mkdir(parents=True, exist_ok=True)
    make_folder(base)
    problems.write_dialogues(solved, problems.training(num_puzzles, 2 * seed), problems.held_out(48))
    announce("the teacher: SmolLM2 on solved puzzles, plain SFT")
    one_process = ["parallel.tensor_model_parallel_size=1", "cluster.gpus_per_node=1"]
    data = [
        f"model.hf={base}",
        f"data.train={solved}",
        "pear.variant=none",
        f"train.max_steps={steps}",
        f"seed={seed}",
    ]
    train(RECIPES / "puzzles.yaml", output / "teacher-run", [*data, *one_process], processes=1)
    if not (output / "teacher").is_dir():
        command(output, "export", "--checkpoint", output / "teacher-run", "--output", output / "teacher")
    problems.write_problem_set(asked, problems.training(num_puzzles, 2 * seed + 1))
    sampling = ("--num-samples", str(num_samples), "--max-new-tokens", "24", "--seed", str(seed))
    answers = output / "answers"
    command(
        output, "eval", "--model", output / "teacher", "--problems", asked, *sampling, "--output", answers
    )
    count = write_right_answers(answers / "samples.jsonl", asked, output / "right.jsonl")
    announce(f"{count} right answers of the teacher")
    command(
        output, "score", "--model", output / "teacher", "--data", output / "right.jsonl",
        "--output", output / "scored.parquet",
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.puzzles.teacher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="of puzzles, order and samples (default: 0)")
    parser.add_argument(
        "--num-puzzles", type=int, default=192, help="for each of its two sets (default: 192)"
    )
    parser.add_argument("--steps", type=int, default=20, help="of the teacher's training (default: 20)")
    parser.add_argument("--num-samples", type=int, default=2, help="answers to each puzzle (default: 2)")
    args = parser.parse_args(arguments)
    make(
        args.output.resolve(),
        seed=args.seed,
        num_puzzles=args.num_puzzles,
        steps=args.steps,
        num_samples=args.num_samples,
    )


if __name__ == "__main__":
    main()
