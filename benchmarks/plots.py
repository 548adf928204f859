"""Plots of the results: one picture a file, horizontal bars, the same colours for the same names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_OURS, _OTHERS = "#2f6f9f", "#b9b2a6"
Bars = list[tuple[str, float]]


def plot_record(record: dict[str, Any], kind: str, path: Path) -> None:
    """Writes a result file's picture."""
    panels = _PANELS[kind](record)
    heights = [max(2, len(bars)) for _, _, bars in panels]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(7.5, 0.55 * len(panels) + 0.24 * sum(heights)),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for ax, (title, unit, bars) in zip(axes[:, 0], panels, strict=True):
        _draw(ax, title, unit, bars)
    figure.text(0.995, 0.005, record["hardware"], ha="right", va="bottom", fontsize=6, color="#777777")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _draw(ax: Any, title: str, unit: str, bars: Bars) -> None:
    names, values = [name for name, _ in bars], [value for _, value in bars]
    ours = [name.startswith(("ours", "pear_loss", "PEAR", "variant none")) for name in names]
    drawn = ax.barh(names, values, color=[_OURS if mine else _OTHERS for mine in ours])
    ax.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3, fontsize=7)
    ax.invert_yaxis()
    ax.set_title(f"{title} ({unit})", fontsize=8, loc="left")
    ax.tick_params(labelsize=7)
    ax.set_xticks([])
    ax.margins(x=0.12)
    for side in ("top", "right", "bottom"):
        ax.spines[side].set_visible(False)


def _shapes(record: dict[str, Any], keys: tuple[str, ...]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows that have numbers, by shape."""
    shapes: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        if "error" not in row:
            shapes.setdefault(tuple(row[key] for key in keys), []).append(row)
    return shapes


def _logprob(record: dict[str, Any]) -> list[tuple[str, str, Bars]]:
    shapes = _shapes(record, ("tokens", "columns", "dtype", "masked"))
    return [
        (
            f"{t} x {v} {d}, {m:.0%} masked",
            "ms, forward and backward",
            [(r["name"], r["ms"]["both"]) for r in rows],
        )
        for (t, v, d, m), rows in shapes.items()
    ]


def _token_losses(record: dict[str, Any]) -> list[tuple[str, str, Bars]]:
    return [
        (f"{t} x {v} {d}", "times the NLL alone", [(r["name"], r["times_nll"]) for r in rows])
        for (t, v, d), rows in _shapes(record, ("tokens", "columns", "dtype")).items()
    ]


def _output_layer(record: dict[str, Any]) -> list[tuple[str, str, Bars]]:
    panels = []
    for (tokens, columns), rows in _shapes(record, ("tokens", "columns")).items():
        panels.append((f"{tokens} tokens x {columns}", "ms", [(r["name"], r["ms"]) for r in rows]))
        with_memory = [(r["name"], r["peak_bytes"] / 1e6) for r in rows if "peak_bytes" in r]
        panels.append((f"{tokens} tokens x {columns}", "MB above the inputs", with_memory))
    return panels


def _step(record: dict[str, Any]) -> list[tuple[str, str, Bars]]:
    panels = []
    for (tokens,), rows in _shapes(record, ("tokens",)).items():
        speeds = [(r["name"], 1e3 * r["tokens"] / r["ms"]) for r in rows]
        panels.append((f"{record['model']}, {tokens} tokens", "tokens / s", speeds))
        memory = [(r["name"], r["peak_bytes"] / 1e9) for r in rows]
        panels.append((f"{record['model']}, {tokens} tokens", "peak GB", memory))
    if record.get("longest"):
        panels.append(("longest sequence", "tokens", list(record["longest"].items())))
    return panels


def _real_model(record: dict[str, Any]) -> list[tuple[str, str, Bars]]:
    rows = [r for r in record["rows"] if r.get("tokens_per_second")]
    return [(record["model"], "tokens / s", [(r["name"], r["tokens_per_second"]) for r in rows])]


def _cli(record: dict[str, Any]) -> list[tuple[str, str, Bars]]:
    return [("until it has answered", "ms", [(r["name"], r["ms"]) for r in record["rows"]])]


_PANELS: dict[str, Callable[[dict[str, Any]], list[tuple[str, str, Bars]]]] = {
    "logprob": _logprob,
    "token_losses": _token_losses,
    "output_layer": _output_layer,
    "step": _step,
    "real_model": _real_model,
    "cli": _cli,
}
