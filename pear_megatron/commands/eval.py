"""`pear-megatron eval`: pass@k of a checkpoint, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pear_megatron.commands.text_options import ChatTemplateKwargsOption, text_settings

EPILOG = (
    "Example: pear-megatron eval --model results/run/export --problems problems.jsonl --grader grader.py "
    "--num-samples 8 --k 1,8 --output results/eval/run    then: pear-megatron eval-compare results/eval/sft "
    "results/eval/run"
)


def evaluate(
    model: Annotated[
        str, typer.Option(help="Hugging Face folder: an export, or a checkpoint of GRPO", show_default=False)
    ],
    problems: Annotated[
        str,
        typer.Option(
            help="problems.jsonl (with --grader), or YAML: a problem set, or a recipe's data.validation",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(help="folder of this evaluation; the same command continues it", show_default=False),
    ],
    grader: Annotated[
        str | None, typer.Option(help="Python file with def grade(response, answer, problem) -> float")
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
    chat_template_kwargs: ChatTemplateKwargsOption = None,
    batch_size: Annotated[int, typer.Option(help="prompts at once; changes no sample beyond rounding")] = 32,
    engine: Annotated[str, typer.Option(help="transformers, or vllm (not tested yet)")] = "transformers",
    dtype: Annotated[
        str | None, typer.Option(help="bf16 or fp32; default bf16 on a GPU, fp32 without")
    ] = None,
) -> None:
    """Sample responses to problems, grade them, and estimate pass@k; eval-compare compares two evaluations."""
    from rich.console import Console

    from pear_megatron.evaluate.figures import pass_at_k, results_table
    from pear_megatron.evaluate.page import page_of_one
    from pear_megatron.evaluate.run import evaluate as run
    from pear_megatron.evaluate.samples import read_samples
    from pear_megatron.pages.figures import write_png
    from pear_megatron.problems.load import load_problems, read_problems_config
    from pear_megatron.storage import write_atomically

    settings = text_settings(None, None, chat_template_kwargs) | ({"dtype": dtype} if dtype else {})
    results = run(
        model,
        load_problems(read_problems_config(problems, grader)),
        output,
        ks=_integers([part for text in k or [f"1,{num_samples}"] for part in text.split(",")]),
        right_at=right_at,
        batch_size=batch_size,
        num_samples=num_samples,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
        engine=engine,
        **settings,
    )
    write_atomically(output / "index.html", page_of_one(results, read_samples(output)))
    write_png(pass_at_k({Path(model).name: [results]}), output / "pass_at_k.png")
    Console().print(results_table(results))
    print(f"responses and results: {output}; open {output / 'index.html'} in a browser")


def _integers(texts: list[str]) -> list[int]:
    from pear_megatron.errors import EvalError

    try:
        return [int(text) for text in texts]
    except ValueError as error:
        raise EvalError(f"--k {','.join(texts)}: give whole numbers, as 1,8") from error
