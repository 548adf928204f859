"""run: from settings to the page, its JSON and the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from pear_megatron.data import DataError
from pear_megatron.data.chat import ChatEncoder
from pear_megatron.data.tokenizer import load_tokenizer
from pear_megatron.inspect.alternatives import Alternative
from pear_megatron.inspect.page import page
from pear_megatron.inspect.report import Report, make_report
from pear_megatron.inspect.sample import draw, read_policy_logprobs, score
from pear_megatron.inspect.settings import Settings
from pear_megatron.storage import write_atomically

_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold", "good": "bold green"}


def run(
    settings: Settings, *, model: str | None, scored: bool, output: Path, max_trajectories: int, seed: int
) -> Report:
    """Looks at the data, writes the page and its JSON, and prints the short form.

    Args:
        model: the policy that training starts from, or None.
        scored: take the policy's log-probs from the data.
        output: the page; the JSON goes beside it.
        max_trajectories: of more, as many are drawn, with ``seed``.

    Raises:
        DataError: training would refuse the data. For misaligned log-probs, after the page is written.
        PearError: the model or the output cannot be used.
    """
    known = model is not None or scored
    sample = draw(
        settings.data,
        require_behavior_logprobs=known and settings.pear.variant != "none",
        vocab_size=settings.vocab_size,
        max_trajectories=max_trajectories,
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    tokenizer = load_tokenizer(settings.data.tokenizer) if settings.data.tokenizer is not None else None
    policy, logprobs = "none: no ratios", None
    if model is not None:
        policy, logprobs = model, score(model, sample.trajectories, dtype=settings.dtype)
    elif scored:
        policy, logprobs = "the column policy_logprobs", read_policy_logprobs(sample)
    report = make_report(
        sample,
        logprobs,
        settings.pear,
        policy=policy,
        tokenizer=tokenizer,
        special_ids=ChatEncoder(tokenizer).special_ids if tokenizer is not None else None,
    )
    _write(report, output)
    _print(report, Console() if sys.stdout.isatty() else Console(width=140))
    print(f"page: {output}")
    if report.ratios is not None and report.ratios.alignment.shift:
        first = ", ".join(trajectory.id for trajectory in sample.trajectories[:3])
        raise DataError(f"{sample.files[0]} ({first}, ...): {report.ratios.alignment.refusal()}")
    return report


def _write(report: Report, output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, page(report))
        write_atomically(output.with_suffix(".json"), json.dumps(report.as_json(), indent=1, default=_plain))
    except OSError as error:
        raise DataError(f"--output {output} cannot be written: {error}") from error


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's."""
    return value.item()


def _print(report: Report, console: Console) -> None:
    """The short form: verdicts, and the table of settings."""
    for verdict in report.verdicts:
        line = Text(f"{verdict.level}: {verdict.title}. ", style=_STYLES[verdict.level])
        line.append(verdict.text, style="not bold default")
        line.append(f" {verdict.change}", style="italic not bold default")
        console.print(line, soft_wrap=not console.is_terminal)
    if report.ratios is None or report.ratios.alignment.shift:
        return
    lines = table_lines(report.ratios.alternatives, console.width)
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)


def table_lines(alternatives: list[Alternative], width: int) -> list[str]:
    """The table of settings: a line each where ``width`` characters hold it, otherwise two, the numbers below."""
    rows = [Alternative.COLUMNS, *(row.cells() for row in alternatives)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    names = ["setting", *(row.name for row in alternatives)]
    longest = max(map(len, names))
    lines = ["On the same trajectories:"]
    for name, values in zip(names, numbers, strict=True):
        if longest + 2 + len(values) <= width:
            lines.append(f"{name:{longest}}  {values}")
        else:
            lines += [name, f"  {values}"]
    return lines
