"""The `pear-megatron` command. Training itself is started by torchrun: python -m pear_megatron.train."""

from __future__ import annotations

from typing import Annotated

import typer

from pear_megatron import __version__, interrupt
from pear_megatron.commands import (
    compare,
    convert,
    doctor,
    eval,
    eval_compare,
    export,
    grpo,
    inspect,
    plan,
    recipes,
    score,
    validate,
)
from pear_megatron.commands.errors import say_errors
from pear_megatron.ranks import end_with_parent
from pear_megatron.streams import steady

app = typer.Typer(
    help="PEAR for Megatron-Core. Train with: torchrun -m pear_megatron.train --config RECIPE.yaml",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        from pear_megatron.ops.library import with_cuda
    except ImportError:
        ops = "compiled ops missing"
    else:
        ops = "with CUDA ops" if with_cuda else "CPU ops only"
    print(f"pear-megatron {__version__}, {ops}")
    raise typer.Exit


# What Ctrl-C leaves, of the commands that are long at work.
_KEPT = {
    "score": "the chunks that are scored stay beside --output, and the same command goes on",
    "eval": "the responses so far stay in --output, and the same command goes on",
    "compare": "finished cells and checkpoints stay in output_dir, and the same command goes on",
    "grpo": "checkpoints stay in the run's folder, and the same command goes on from the newest",
    "convert": "nothing was written to --output",
    "export": "nothing was written to --output",
}


@app.callback()
def _commands(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="print it, and which ops are compiled"
        ),
    ] = False,
) -> None:
    """Options before the command's name."""
    steady()
    end_with_parent()
    name = context.invoked_subcommand or ""
    interrupt.end_on_interrupt(
        _KEPT.get(name, "the same command starts again"), clean=name in ("convert", "export")
    )


app.command("validate", epilog=validate.EPILOG)(say_errors(validate.validate))
app.command("score", epilog=score.EPILOG)(say_errors(score.score))
app.command("inspect", epilog=inspect.EPILOG)(say_errors(inspect.inspect))
app.command("plan", epilog=plan.EPILOG)(say_errors(plan.plan))
app.command("convert", epilog=convert.EPILOG)(say_errors(convert.convert))
app.command("export", epilog=export.EPILOG)(say_errors(export.export))
app.command("grpo", epilog=grpo.EPILOG)(say_errors(grpo.grpo))
app.command("eval", epilog=eval.EPILOG)(say_errors(eval.evaluate))
app.command("eval-compare", epilog=eval_compare.EPILOG)(say_errors(eval_compare.eval_compare))
app.command("compare", epilog=compare.EPILOG)(say_errors(compare.compare))
app.command("doctor", epilog=doctor.EPILOG)(say_errors(doctor.doctor))
app.add_typer(recipes.recipes, name="recipes")
app.add_typer(recipes.slurm, name="slurm")

if __name__ == "__main__":
    app()
