"""digest: a short name for which items a step saw, and in which order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def digest(items: Sequence[int]) -> str:
    """Twelve hex characters that differ when an item or its place does."""
    return hashlib.sha256(",".join(map(str, items)).encode()).hexdigest()[:12]
