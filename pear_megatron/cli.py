"""The `pear-megatron` command. Training itself is started by torchrun: python -m pear_megatron.train."""

from __future__ import annotations

import typer

from pear_megatron import interrupt
from pear_megatron.commands import compare, convert, eval, export, grpo, inspect, plan, score, validate

app = typer.Typer(
    help="PEAR for Megatron-Core. Train with: torchrun -m pear_megatron.train --config RECIPE.yaml",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
def _commands(context: typer.Context) -> None:
    name = context.invoked_subcommand or ""
    interrupt.end_on_interrupt(
        _KEPT.get(name, "the same command starts again"), clean=name in ("convert", "export")
    )


app.command("validate", epilog=validate.EPILOG)(validate.validate)
app.command("score", epilog=score.EPILOG)(score.score)
app.command("inspect", epilog=inspect.EPILOG)(inspect.inspect)
app.command("plan", epilog=plan.EPILOG)(plan.plan)
app.command("convert", epilog=convert.EPILOG)(convert.convert)
app.command("export", epilog=export.EPILOG)(export.export)
app.command("grpo", epilog=grpo.EPILOG)(grpo.grpo)
app.command("eval", epilog=eval.EPILOG)(eval.evaluate)
app.command("compare", epilog=compare.EPILOG)(compare.compare)

if __name__ == "__main__":
    app()
