"""Prints the tables of README from the committed results, as Markdown.

python benchmarks/table.py                                    # every file of results/
python benchmarks/table.py benchmarks/results/logprob-cpu.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def heading(record: dict[str, Any]) -> str:
    """Where the numbers come from."""
    packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{record['hardware']}; {packages}.\n`{record['command']}`"


def logprob_tables(record: dict[str, Any]) -> str:
    """One table per shape: milliseconds, share of the copy bandwidth, memory, times ours."""
    lines = [
        heading(record),
        f"A copy moves {record['copy_bytes_per_second'] / 1e9:.0f} GB/s in the same run.",
    ]
    shapes: dict[tuple, list[dict[str, Any]]] = {}
    for entry in record["rows"]:
        key = (entry["tokens"], entry["columns"], entry["dtype"], entry["masked"])
        shapes.setdefault(key, []).append(entry)
    for (tokens, columns, dtype, masked), entries in shapes.items():
        ours = next((e["ms"]["both"] for e in entries if e["name"] == "ours, in place" and "ms" in e), None)
        lines += ["", f"**{tokens} x {columns} {dtype}, {masked:.0%} of the tokens masked**", ""]
        lines.append(
            row(
                "",
                "forward ms",
                "backward ms",
                "both ms",
                "of copy bandwidth",
                "extra memory / logits",
                "time / ours",
            )
        )
        lines.append(row("---", *["---:"] * 6))
        for entry in entries:
            if "error" in entry:
                lines.append(row(entry["name"], *["-"] * 5, entry["error"]))
                continue
            ms = entry["ms"]
            lines.append(
                row(
                    entry["name"],
                    *(f"{ms[d]:.3g}" for d in ("forward", "backward", "both")),
                    f"{entry['share_of_copy']['both']:.0%}",
                    f"{entry['peak_share_of_logits']:.3f}",
                    f"{ms['both'] / ours:.2f}" if ours else "-",
                )
            )
    if record["skipped"]:
        lines += [
            "",
            "Not run: " + "; ".join(f"{name} ({why})" for name, why in record["skipped"].items()) + ".",
        ]
    return "\n".join(lines)


def step_table(record: dict[str, Any]) -> str:
    """Whole training steps."""
    lines = [heading(record), "", f"**{record['model']}**", ""]
    lines.append(row("loss", "tokens", "ms / step", "tokens / s", "peak GB"))
    lines.append(row("---", *["---:"] * 4))
    for e in record["rows"]:
        if "error" in e:
            lines.append(row(e["name"], str(e["tokens"]), e["error"], "-", "-"))
            continue
        memory = f"{e['peak_bytes'] / 1e9:.2f}" if e["peak_bytes"] else "-"
        lines.append(
            row(e["name"], str(e["tokens"]), f"{e['ms']:.4g}", f"{1e3 * e['tokens'] / e['ms']:.0f}", memory)
        )
    return "\n".join(lines)


def print_logprob(path: Path) -> None:
    print(logprob_tables(json.loads(path.read_text())))


def print_step(path: Path) -> None:
    print(step_table(json.loads(path.read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="*", help="default: every file of results/")
    for path in parser.parse_args().files or sorted(RESULTS.glob("*.json")):
        print(f"\n### {path.stem}\n")
        (print_step if path.stem.startswith("step") else print_logprob)(path)


if __name__ == "__main__":
    main()
