"""What every page is made of: verdicts, sections, and ``render``, which makes one HTML file of them.

The file needs nothing else, and works without JavaScript.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

Level = Literal["error", "warning", "note", "good"]


@dataclass(frozen=True)
class Verdict:
    """One finding.

    Attributes:
        level: ``error`` = it is refused; ``warning`` = it would be something else than you want; ``note`` =
            good to know; ``good`` = as it should be.
        title: a few words.
        text: what was seen, and what it means.
        change: what to do about it.
    """

    level: Level
    title: str
    text: str
    change: str


def in_order(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """The worst first; those of one level stay in their order."""
    return sorted(verdicts, key=lambda verdict: get_args(Level).index(verdict.level))


@dataclass(frozen=True)
class Section:
    """What a page shows beside its own parts.

    Attributes:
        title: its heading.
        words: a paragraph each.
        columns, rows: a table's: a row is its name and a cell for each column.
        pictures: each with its caption.
    """

    title: str
    words: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[tuple[str, Sequence[str]]] = ()
    pictures: Sequence[tuple[str, Markup]] = ()


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("pear_megatron.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, **context: Any) -> str:
    """The page that a file of ``templates/`` makes of ``context``; every text in it is escaped."""
    return _environment().get_template(template).render(context)
