"""Section: a part of a page in words, with a table and pictures where it has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


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
