"""Makes the figures of docs from the committed results: Markdown tables, and with --write the plots too.

python benchmarks/table.py                                    # prints every file of results/
python benchmarks/table.py benchmarks/results/logprob-cpu.json
python benchmarks/table.py --write                            # pages of docs between their markers, and docs/images/
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- benchmarks/table.py --write: begin -->", "<!-- benchmarks/table.py --write: end -->"


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


def token_losses_table(record: dict[str, Any]) -> str:
    """What the loss takes of a token, and what more it costs than the NLL."""
    lines = [heading(record), "", row("", "logits", "forward and backward ms", "time / NLL")]
    lines.append(row("---", "---", "---:", "---:"))
    for e in record["rows"]:
        shape = f"{e['tokens']} x {e['columns']} {e['dtype']}"
        lines.append(row(e["name"], shape, f"{e['ms']:.3g}", f"{e['times_nll']:.2f}"))
    return "\n".join(lines)


def step_table(record: dict[str, Any]) -> str:
    """Whole training steps, and the longest sequence that each loss can train."""
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
    if record.get("longest"):
        unit, limit = record["longest_unit"], record["longest_limit"]
        lines += ["", f"Longest sequence whose step fits into memory, in multiples of {unit} tokens:", ""]
        for name, tokens in record["longest"].items():
            more = ", the longest tried" if tokens + unit > limit else ""
            lines.append(f"- {name}: {tokens}{more}")
    return "\n".join(lines)


def output_layer_tables(record: dict[str, Any]) -> str:
    """One table per shape: time of forward and backward, against the GEMMs alone, and memory."""
    lines = [heading(record)]
    shapes: dict[tuple, list[dict[str, Any]]] = {}
    for entry in record["rows"]:
        key = (entry["tokens"], entry["hidden"], entry["columns"], entry["dtype"])
        shapes.setdefault(key, []).append(entry)
    for (tokens, hidden, columns, dtype), entries in shapes.items():
        alone = next((e.get("ms") for e in entries if e["name"] == "the three GEMMs alone"), None)
        lines += ["", f"**{tokens} tokens x {hidden} -> {columns}, {dtype}**", ""]
        lines.append(row("", "ms", "time / GEMMs alone", "extra memory MB", "memory / logits"))
        lines.append(row("---", *["---:"] * 4))
        for e in entries:
            if "error" in e:
                lines.append(row(e["name"], e["error"], "-", "-", "-"))
                continue
            memory = ("-", "-")
            if "peak_bytes" in e:
                memory = (f"{e['peak_bytes'] / 1e6:.0f}", f"{e['peak_bytes'] / e['logits_bytes']:.3f}")
            lines.append(
                row(e["name"], f"{e['ms']:.4g}", f"{e['ms'] / alone:.2f}" if alone else "-", *memory)
            )
    if record["skipped"]:
        reasons = "; ".join(f"{name} ({why})" for name, why in record["skipped"].items())
        lines += ["", f"Not run: {reasons}."]
    return "\n".join(lines)


def attention_table(record: dict[str, Any]) -> str:
    """Time and memory of a layer's core attention, by the length of the row."""
    lines = [heading(record), "", f"**{record['model']}**", ""]
    lines += [row("tokens", "attention", "ms, forward and backward", "peak MB"), row(*["---:", "---"] * 2)]
    for e in record["rows"]:
        cells = (e["error"], "-") if "error" in e else (f"{e['ms']:.4g}", f"{e['peak_bytes'] / 1e6:.0f}")
        lines.append(row(str(e["tokens"]), e["name"], *cells))
    if record["skipped"]:
        reasons = "; ".join(f"{name} ({why})" for name, why in record["skipped"].items())
        lines += ["", f"Not run: {reasons}."]
    return "\n".join(lines)


def real_model_table(record: dict[str, Any]) -> str:
    """SmolLM2-135M: speed of training against TRL's, and what the commands ended with."""
    lines = [heading(record), "", f"**{record['model']}**", ""]
    lines.append(row("", "tokens / s", "last nll", "solved", "interval"))
    lines.append(row("---", *["---:"] * 4))
    for e in record["rows"]:
        if "error" in e:
            lines.append(row(e["name"], e["error"], "-", "-", "-"))
            continue
        solved = e.get("solved")
        cells = ("-", "-") if solved is None else (f"{solved[0]:.1%}", f"{solved[1]:.1%} to {solved[2]:.1%}")
        speed, nll = (f"{e[key]:.4g}" if e.get(key) else "-" for key in ("tokens_per_second", "nll"))
        lines.append(row(e["name"], speed, nll, *cells))
    return "\n".join(lines)


def cli_table(record: dict[str, Any]) -> str:
    """Time until a command has answered."""
    lines = [heading(record), "", row("command", "ms", "processor ms"), row("---", *["---:"] * 2)]
    lines += [row(e["name"], f"{e['ms']:.0f}", f"{e['processor_ms']:.0f}") for e in record["rows"]]
    return "\n".join(lines)


def lora_table(record: dict[str, Any]) -> str:
    """NLL of held-out puzzles after so many steps."""
    steps = [str(e["step"]) for e in record["rows"][0]["evaluations"]]
    lines = [heading(record), "", row("held-out NLL after step", *steps), row("---", *["---:"] * len(steps))]
    lines += [row(e["name"], *(f"{x['nll']:.3f}" for x in e["evaluations"])) for e in record["rows"]]
    return "\n".join(lines)


# By the beginning of the file's name; the order is the page's.
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "logprob": logprob_tables,
    "token_losses": token_losses_table,
    "output_layer": output_layer_tables,
    "step": step_table,
    "attention": attention_table,
    "real_model": real_model_table,
    "cli": cli_table,
    "lora": lora_table,
}


# What a file of each kind is about.
CAPTIONS = {
    "logprob": "The loss alone on given logits, forward and backward, with a weight per token; all in the same run.",
    "token_losses": "A KL from a stored top-k, the entropy, and the weights' factors, beside the NLL alone, in turns: "
    "medians of rounds (processor time on a CPU).",
    "output_layer": "The whole output layer: its three GEMMs (four in chunks), loss, both gradients.",
    "step": "Whole training steps: forward, loss, backward, clipping, AdamW.",
    "attention": "The core attention of one layer over a packed row.",
    "real_model": "A real model, from import to evaluation.",
    "cli": "How long the commands take to answer: --help, and a recipe with a misspelt key.",
    "lora": "LoRA against full training.",
}

PAGE = ROOT / "docs" / "benchmarks.md"
# Kinds whose table stands in another page, without a picture.
PAGES = {
    "attention": ROOT / "docs" / "long-sequences.md",
    "lora": ROOT / "docs" / "hugging-face.md",
}


def kind(path: Path) -> str:
    found = next((name for name in TABLES if path.stem.startswith(name)), None)
    if found is None:
        raise SystemExit(f"{path}: a results file's name begins with what it measures: {', '.join(TABLES)}")
    return found


def committed() -> list[Path]:
    """The result files, in the page's order."""
    return sorted(RESULTS.glob("*.json"), key=lambda path: (list(TABLES).index(kind(path)), path.stem))


def print_record(path: Path) -> None:
    print(TABLES[kind(path)](json.loads(path.read_text())))


def benchmarks_section() -> str:
    """What stands between the markers of docs/benchmarks.md."""
    parts = []
    for path in committed():
        if kind(path) in PAGES:
            continue
        record = json.loads(path.read_text())
        image = f"images/{path.stem}.png"
        about = CAPTIONS[kind(path)]
        parts.append(f"{about}\n\n![{about}]({image})\n\n{TABLES[kind(path)](record)}")
    return "\n\n".join(parts)


def page_section(name: str) -> str:
    """What stands between the markers of a kind's own page."""
    paths = [path for path in committed() if kind(path) == name]
    return "\n\n".join(TABLES[name](json.loads(path.read_text())) for path in paths)


def with_section(text: str, section: str | None = None) -> str:
    """docs/benchmarks.md, or another page with its section, made anew between the markers."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{benchmarks_section() if section is None else section}\n{END}{after}"


def write() -> None:
    """The pages and the plots."""
    from plots import plot_record

    for name, page in PAGES.items():
        page.write_text(with_section(page.read_text(), page_section(name)))
    for path in committed():
        if kind(path) in PAGES:
            continue
        plot_record(json.loads(path.read_text()), kind(path), ROOT / "docs" / "images" / f"{path.stem}.png")
    PAGE.write_text(with_section(PAGE.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="*", help="default: every file of results/")
    parser.add_argument(
        "--write", action="store_true", help="the pages and plots, from every file of results/"
    )
    args = parser.parse_args()
    if args.write:
        write()
        return
    for path in args.files or committed():
        print(f"\n### {path.stem}\n")
        print_record(path)


if __name__ == "__main__":
    main()
