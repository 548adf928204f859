"""Finding: one line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        section: of the report: ``system``, ``packages``, ``ops``, ``a run here uses``, ``extras``.
        name: of the thing.
        value: its version or state.
        fault: what does not fit, and the way out; None = nothing.
    """

    section: str
    name: str
    value: str
    fault: str | None = None
