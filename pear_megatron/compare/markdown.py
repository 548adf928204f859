"""markdown_table: a comparison's results.json as a table for reports and READMEs.

python -m pear_megatron.compare.markdown results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pear_megatron.compare.table import make_table


def markdown_table(results: dict[str, Any]) -> str:
    """One row per arm: means with 95 % intervals, and the paired difference from the baseline where it is clear of 0.

    Args:
        results: the content of results.json.
    """
    table = make_table(results)
    lines = [
        f"| arm ({table.num_seeds} seed{'s' * (table.num_seeds > 1)}) | {' | '.join(table.titles)} |",
        "| --- |" + " ---: |" * len(table.titles),
    ]
    for row in table.rows:
        cells = [str(mean) for mean in row.means]
        for i, difference in enumerate(row.differences or []):
            if difference.clear:
                cells[i] += f"<br>**{difference}**"
        lines.append(f"| {row.arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown_table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
