"""markdown_table: a comparison's results.json as a table for reports and READMEs.

python -m pear_megatron.compare.markdown results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


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
            text = _interval(content["measures"][key], key, "", one_seed)
            difference = content["against_baseline"] and content["against_baseline"][key]
            if (
                difference
                and not (one_seed and "pass@" not in key)
                and difference["low"] * difference["high"] > 0
            ):
                text += f"<br>**{_interval(difference, key, '+', False)}**"
            cells.append(text)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _interval(estimate: dict[str, float], key: str, sign: str, one_seed: bool) -> str:
    digits = 1 if key == "take_off" else 3
    mean, low, high = (f"{estimate[name]:{sign}.{digits}f}" for name in ("mean", "low", "high"))
    return mean if one_seed and "pass@" not in key else f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    print(markdown_table(json.loads(Path(sys.argv[1]).read_text())), end="")
