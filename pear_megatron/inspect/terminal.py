"""The short form of a report, for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pear_megatron.inspect.alternatives import Setting
from pear_megatron.inspect.report import Report

_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold", "good": "bold green"}


def show(report: Report, console: Console) -> None:
    """Prints verdicts and the table of settings."""
    for verdict in report.verdicts:
        line = Text(f"{verdict.level}: {verdict.title}. ", style=_STYLES[verdict.level])
        line.append(verdict.text, style="not bold default")
        if verdict.change:
            line.append(f" {verdict.change}", style="italic not bold default")
        console.print(line, soft_wrap=not console.is_terminal)
    if report.ratios is None or report.ratios.alignment.shift:
        return
    table = Table(
        title="On the same trajectories:", title_justify="left", title_style="", box=None, pad_edge=False
    )
    table.add_column("setting", overflow="fold")
    for name in Setting.COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for setting in report.ratios.alternatives:
        style = None if setting.overrides else "bold"
        table.add_row(setting.overrides or "as given", *setting.cells(), style=style)
    console.print(table)
