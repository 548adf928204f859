"""`pear-megatron eval`: pass@k of a checkpoint with intervals, and two checkpoints compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

EPILOG = (
    "Example: pear-megatron eval --model results/run/export --problems problems.jsonl --grader grader.py "
    "--num-samples 8 --k 1,8 --output results/eval/run    then: pear-megatron eval --compare results/eval/sft "
    "results/eval/pear"
)


def evaluate(
    model: Annotated[
        str | None, typer.Option(help="Hugging Face folder: an export, or a checkpoint of GRPO")
    ] = None,
    problems: Annotated[
        str | None,
        typer.Option(
            help="problems.jsonl (with --grader), or YAML: a problem set, or a recipe's data.validation"
        ),
    ] = None,
    grader: Annotated[
        str | None, typer.Option(help="Python file with def grade(response, answer, problem) -> float")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="folder of this evaluation; the same command continues it")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="responses to each problem")] = 8,
    k: Annotated[
        list[str] | None, typer.Option(help="k of pass@k, as 1,8 or repeated; default 1 and --num-samples")
    ] = None,
    temperature: Annotated[float, typer.Option(help="1 = the model's own distribution, 0 = greedy")] = 1.0,
    top_p: Annotated[float, typer.Option(help="1 = all tokens")] = 1.0,
    max_new_tokens: Annotated[
        int, typer.Option(help="a longer response is cut, and counted as truncated")
    ] = 1024,
    seed: Annotated[
        int, typer.Option(help="of the samples; two checkpoints are compared under the same")
    ] = 0,
    right_at: Annotated[float, typer.Option(help="score from which a response is right")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="prompts at once; changes no sample beyond rounding")] = 32,
    engine: Annotated[str, typer.Option(help="transformers, or vllm (not tested yet)")] = "transformers",
    dtype: Annotated[
        str | None, typer.Option(help="bf16 or fp32; default bf16 on a GPU, fp32 without")
    ] = None,
    compare: Annotated[
        tuple[str, str],
        typer.Option(
            help="two evaluations: folders or results.json; 'a,b,c' or a quoted glob = several runs of one arm",
            show_default=False,
        ),
    ] = ("", ""),
) -> None:
    """Sample responses to problems, grade them, and estimate pass@k; or compare two evaluations, paired."""
    from pear_megatron.errors import PearError

    try:
        if any(compare):
            _compare(compare, output)
            return
        if not (model and problems and output):
            raise PearError(
                "give --model, --problems and --output, or --compare; see pear-megatron eval --help"
            )
        options: dict[str, Any] = {"dtype": dtype} if dtype else {}
        ks = [part for text in k or [f"1,{num_samples}"] for part in text.split(",")]
        _evaluate(
            model,
            problems,
            grader,
            output,
            ks=_integers(ks),
            right_at=right_at,
            batch_size=batch_size,
            num_samples=num_samples,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            seed=seed,
            engine=engine,
            **options,
        )
    except (PearError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


def _integers(texts: list[str]) -> list[int]:
    from pear_megatron.errors import EvalError

    try:
        return [int(text) for text in texts]
    except ValueError as error:
        raise EvalError(f"--k {','.join(texts)}: give whole numbers, as 1,8") from error


def _evaluate(model: str, problems: str, grader: str | None, output: Path, **settings: Any) -> None:
    from rich.console import Console

    from pear_megatron.evaluate.figures import draw_pass_at_k, results_table
    from pear_megatron.evaluate.run import evaluate as run
    from pear_megatron.problems.load import load_problems, read_problems_config

    results = run(model, load_problems(read_problems_config(problems, grader)), output, **settings)
    draw_pass_at_k(output / "pass_at_k.png", {Path(model).name: [results]})
    Console().print(results_table(results))
    print(f"responses and results: {output}")


def _compare(paths: tuple[str, str], output: Path | None) -> None:
    from rich.console import Console

    from pear_megatron.evaluate.figures import comparison_table, draw_pass_at_k
    from pear_megatron.evaluate.paired import compare, read_arm, write_comparison

    first, second = (read_arm(path) for path in paths)
    comparison = compare(first, second)
    Console().print(comparison_table(paths, comparison, len(first)))
    if output is not None:
        write_comparison(output / "comparison.json", paths, comparison)
        draw_pass_at_k(output / "pass_at_k.png", dict(zip(paths, (first, second), strict=True)))
