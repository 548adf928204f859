"""Figures in one style: matplotlib's, as inline SVG that follows the page's colours, or as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # drawn without pyplot: no display, no global state
from PIL import Image

from pear_megatron.storage import appearing

# Okabe and Ito's colours, told apart by colour-blind readers; line styles say it again.
COLORS = (
    "#000000",
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8A8A8A",
    "#7A4B2A",
    "#B8A500",
)
BLUE, ORANGE, INK, RULE, AXIS = "#0072B2", "#D55E00", "#1C2430", "#DDDDDD", "#999999"
BAND = "#F3E2A9"  # a stretch of an axis that is spoken of
BROAD, NARROW = 11.0, 4.7  # inches: of a page's text, at 1280 px and at 400 px
_LINES: tuple[Any, ...] = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), ":")
# The page's own colours, which change in the dark (templates/style.css); of the lines those that would be too pale
# on white or too dark on black.
_OF_THE_PAGE = {
    "#000000": "var(--ink)",
    INK: "var(--ink)",
    RULE: "var(--rule)",
    AXIS: "var(--axis)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    BAND: "var(--band)",
    **{COLORS[i]: f"var(--line-{i})" for i in (4, 5, 6, 8, 9)},
}
_DARK = (13, 17, 23)  # GitHub's page in the dark
_SVG: dict[Any, Any] = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana"]}
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that finds room for its labels by itself; inches."""
    return Figure(figsize=(width, height), layout="constrained")


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the line with that number, as arguments of ``Axes.plot``."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": _LINES[index % len(_LINES)]}


def tidy(axes: Axes, grid: str = "y") -> None:
    """No box, and faint lines behind the marks, across the axis ``grid``: "x" or "y"."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis=grid, color=RULE, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def literal(name: str) -> str:
    """A name as matplotlib shows it letter by letter: $ begins no formula, and _ in front hides no line."""
    text = name.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def to_svg(figure: Figure, title: str, shown: Literal["broad", "narrow", ""] = "") -> Markup:
    """An <svg> element for a page, the same bytes for the same figure.

    Args:
        figure: what to draw.
        title: what a screen reader reads out; no two figures of a page may have the same.
        shown: on which pages; empty = on all.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_SVG | {"svg.hashsalt": title + shown}):  # ids must not meet in a page
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<g) id="[^"]*"', r"\1", text)  # figure_1, axes_1, ...: each figure has them
    text = re.sub(r' xmlns(:xlink)?="[^"]*"| (width|height)="[^"]*pt"', "", text)
    text = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", _page_color, text)
    kind = f'class="{shown}" ' if shown else ""
    return Markup(text.replace("<svg", f'<svg {kind}role="img" aria-label="{escape(title)}"', 1))


def in_both_widths(draw: Callable[[bool], Figure], title: str) -> Markup:
    """A figure drawn for a broad page and again for a telephone's; the page shows the one that fits.

    Args:
        draw: makes the figure, ``NARROW`` inches wide where it is told True and ``BROAD`` otherwise.
        title: see ``to_svg``.
    """
    return to_svg(draw(False), title, "broad") + to_svg(draw(True), title, "narrow")


def _page_color(match: re.Match[str]) -> str:
    return f"{match[1]}: {_OF_THE_PAGE.get(match[2].upper(), match[2])}"


def write_png(figure: Figure, path: Path) -> None:
    """The figure as a file, the same bytes for the same figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def write_dark_twin(path: Path) -> Path:
    """A PNG again with light and dark exchanged and its hues kept, as NAME_dark.png beside it."""
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)
    turned = pixels + (255 - pixels.max(-1, keepdims=True) - pixels.min(-1, keepdims=True))
    ground = np.array(_DARK, dtype=np.int16)  # what was white
    twin = path.with_name(f"{path.stem}_dark.png")
    Image.fromarray((ground + turned * (255 - ground) // 255).astype(np.uint8)).save(twin, optimize=True)
    return twin
