"""DataError: everything that is wrong with the input, in one message."""

from __future__ import annotations

from pear_megatron.errors import PearError

_MAX_LISTED = 20


class DataError(PearError, ValueError):
    """The input cannot be trained on as it is.

    Attributes:
        problems: up to 20 lines, each ``FILE:LINE: field, value, and the way out``.
        total: how many problems there are.
    """

    def __init__(self, problems: list[str], total: int | None = None) -> None:
        self.problems = list(problems)
        self.total = len(self.problems) if total is None else total
        lines = [f"{self.total} problem{'' if self.total == 1 else 's'} in the data:"]
        lines += [f"  {problem}" for problem in self.problems]
        if self.total > len(self.problems):
            lines.append(f"  ... and {self.total - len(self.problems)} more")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[DataError], tuple[list[str], int]]:
        # Exceptions pickle by their message; ranks send this one to each other.
        return DataError, (self.problems, self.total)


class RowProblem(ValueError):
    """What is wrong with one row; whoever catches it knows the file and the line."""


class Problems:
    """Collects problems: lists the first 20 and counts the rest."""

    def __init__(self) -> None:
        self.listed: list[str] = []
        self.total = 0

    def add(self, where: str, what: object) -> None:
        """Note that something is wrong at ``where``, a ``FILE:LINE`` or a file."""
        self.total += 1
        if len(self.listed) < _MAX_LISTED:
            self.listed.append(f"{where}: {what}")

    def raise_if_any(self) -> None:
        """Raise one DataError with all that was noted, or return if nothing was."""
        if self.total:
            raise DataError(self.listed, self.total)
