"""markdown_table: a comparison's results.json as a table for reports and READMEs.

python -m pear_megatron.compare.markdown results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pear_megatron.compare.outcome import show
from pear_megatron.evaluate.statistics import Estimate


def markdown_table(results: dict[str, Any]) -> str:
    """A row an arm: means with 95 % intervals, and the paired difference from the baseline where it is clear of 0.

    Args:
        results: the content of results.json.
    """
    titles: dict[str, str] = results["measures"]
    one_seed = len(results["seeds"]) == 1
    lines = [
        f"| arm ({len(results['seeds'])} seed{'s' * (not one_seed)}) | {' | '.join(titles.values())} |",
        "| --- |" + " ---: |" * len(titles),
    ]
    for arm, content in results["arms"].items():
        cells = []
        for key in titles:
            known = not one_seed or "pass@" in key
            text = show(Estimate(**content["measures"][key]), key, signed=False, known=known)
            difference = content["against_baseline"] and Estimate(**content["against_baseline"][key])
            if difference and known and difference.low * difference.high > 0:
                text += f"<br>**{show(difference, key, signed=True, known=True)}**"
            cells.append(text)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown_table(json.loads(Path(sys.argv[1]).read_text())), end="")
