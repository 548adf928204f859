"""DataError: everything that is wrong with the input, in one message."""

from __future__ import annotations

import re

from pear_megatron.errors import PearError

_MAX_LISTED = 20
_MAX_PLACES = 3
# What differs from row to row where the same thing is wrong: numbers, and a field's value.
_OF_THE_ROW = re.compile(r"\d+(?:[.,]\d+)*|(?<== )(?:'[^']*'|\"[^\"]*\")")


class DataError(PearError, ValueError):
    """The input cannot be trained on as it is.

    Attributes:
        problems: one line, or up to 20, each ``FILE:LINE: field, value, and the way out``, with the number of rows
            that have the same problem.
        total: how many rows, or files, have a problem.
        listed: how many of them the lines speak of.
    """

    def __init__(
        self, problems: str | list[str], total: int | None = None, listed: int | None = None
    ) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.listed = len(self.problems) if listed is None else listed
        self.total = self.listed if total is None else total
        lines = [f"{self.total:,} problem{'' if self.total == 1 else 's'} in the data:"]
        lines += [f"  {problem}" for problem in self.problems]
        if self.total > self.listed:
            lines.append(f"  ... and {self.total - self.listed:,} more")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[DataError], tuple[list[str], int, int]]:
        # Exceptions pickle by their message; ranks send this one to each other.
        return DataError, (self.problems, self.total, self.listed)


class RowProblem(ValueError):
    """What is wrong with one row; whoever catches it knows the file and the line."""


class Problems:
    """Collects problems: lists the first 20 kinds, with their first places, and counts all."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}
        self.total = 0

    def add(self, where: str, what: object) -> None:
        """Note that something is wrong at ``where``, a ``FILE:LINE`` or a file."""
        self.total += 1
        key = _OF_THE_ROW.sub("#", str(what))
        if key in self._kinds or len(self._kinds) < _MAX_LISTED:
            self._kinds.setdefault(key, _Kind(str(what))).add(where)

    def raise_if_any(self) -> None:
        """Raise one DataError with all that was noted, or return if nothing was."""
        if self.total:
            kinds = self._kinds.values()
            raise DataError([str(kind) for kind in kinds], self.total, sum(kind.count for kind in kinds))


class _Kind:
    """A problem, in the words of the first row that has it, and where else it is."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._places: list[str] = []
        self.count = 0

    def add(self, where: str) -> None:
        self.count += 1
        if self.count <= _MAX_PLACES:
            self._places.append(where)

    def __str__(self) -> str:
        line = f"{self._places[0]}: {self._what}"
        if self.count == 1:
            return line
        more = ", ..." if self.count > len(self._places) else ""
        return f"{line} ({self.count:,} rows like this: {', '.join(self._places)}{more})"
