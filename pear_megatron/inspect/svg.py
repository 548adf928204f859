"""Plot: a small chart as one SVG element, drawn without any library and styled by the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 40, 40  # margins: labels stand in them
_TICK_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_WITHIN = (0.0, math.log10(2), math.log10(5))  # ticks of a decade


@dataclass(frozen=True)
class Axis:
    """One axis of a plot.

    Attributes:
        low, high: its ends, in the data's units; ``high`` may lie left of ``low``.
        label: what it shows, with the unit.
        decades: values are decimal logarithms and ticks are labelled with the numbers themselves.
        percent: values are shares and ticks are labelled in percent.
    """

    low: float
    high: float
    label: str
    decades: bool = False
    percent: bool = False

    def ticks(self, count: int = 6) -> list[float]:
        """Round values between the ends, about ``count`` of them."""
        low, high = sorted((self.low, self.high))
        span = high - low or 1.0
        if self.decades and span < 2:
            found = [
                power + part for power in range(math.floor(low), math.ceil(high) + 1) for part in _WITHIN
            ]
            return [value for value in found if low <= value <= high]
        raw = span / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(s * power for s in _TICK_STEPS if s * power >= raw * 0.999)
        if self.decades:
            step = max(1.0, float(round(step)))
        first = math.ceil(low / step - 1e-9)
        return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]

    def show(self, value: float) -> str:
        """A tick's text."""
        if self.decades:
            return f"{10.0**value:.1g}" if value < 0 else f"{10.0**value:.0f}"
        return f"{value * 100:g}%" if self.percent else f"{value:g}".replace("-", "\N{MINUS SIGN}")


class Plot:
    """Marks are added one by one, in the data's units, and drawn in that order.

    Args:
        x, y: the axes.
        title: what a reader sees above it, and a screen reader reads out.
        width, height: of the drawing, in pixels; the page scales it to its column.
    """

    def __init__(self, x: Axis, y: Axis, title: str, *, width: int = 520, height: int = 250) -> None:
        self._x, self._y, self._title = x, y, title
        self._width, self._height = width, height
        self._marks: list[str] = []
        self._legend: list[tuple[str, str]] = []

    def _px(self, value: float) -> float:
        share = (value - self._x.low) / ((self._x.high - self._x.low) or 1.0)
        return _LEFT + min(max(share, 0.0), 1.0) * (self._width - _LEFT - _RIGHT)

    def _py(self, value: float) -> float:
        share = (value - self._y.low) / ((self._y.high - self._y.low) or 1.0)
        return self._height - _BOTTOM - min(max(share, 0.0), 1.0) * (self._height - _TOP - _BOTTOM)

    def rescale(self, high: float) -> None:
        """Sets the upper end of the y axis; before the first mark."""
        self._y = replace(self._y, high=high)

    def name(self, css: str, text: str) -> None:
        """An entry of the legend for marks of a class."""
        self._legend.append((css, text))

    def rectangle(
        self,
        left: float,
        right: float,
        low: float,
        high: float,
        css: str,
        tip: str = "",
        opacity: float = 1.0,
    ) -> None:
        """A filled box with a tooltip."""
        x0, x1 = sorted((self._px(left), self._px(right)))
        y0, y1 = sorted((self._py(low), self._py(high)))
        title = f"<title>{escape(tip)}</title>" if tip else ""
        faint = f' fill-opacity="{opacity:.2f}"' if opacity < 1 else ""
        self._marks.append(
            f'<rect class="{css}" x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"{faint}>'
            f"{title}</rect>"
        )

    def line(self, xs: Sequence[float], ys: Sequence[float], css: str, *, cut: bool = False) -> None:
        """Points joined in order; with ``cut`` those below or above the plot are left out."""
        inside = [(x, y) for x, y in zip(xs, ys, strict=True) if not cut or self._y.low <= y <= self._y.high]
        points = " ".join(f"{self._px(x):.1f},{self._py(y):.1f}" for x, y in inside)
        self._marks.append(f'<polyline class="{css}" points="{points}"/>')

    def band(self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], css: str) -> None:
        """The area between two curves."""
        there = [f"{self._px(x):.1f},{self._py(y):.1f}" for x, y in zip(xs, highs, strict=True)]
        back = [f"{self._px(x):.1f},{self._py(y):.1f}" for x, y in zip(xs, lows, strict=True)]
        self._marks.append(f'<polygon class="{css}" points="{" ".join(there + back[::-1])}"/>')

    def vertical(self, x: float, text: str, *, left: bool) -> None:
        """A dashed line over the whole height, with its name to one side; nothing if x lies outside."""
        low, high = sorted((self._x.low, self._x.high))
        if not low <= x <= high:
            return
        px = self._px(x)
        anchor, shift = ("end", -4) if left else ("start", 4)
        self._marks.append(
            f'<line class="mark" x1="{px:.1f}" x2="{px:.1f}" y1="{_TOP}" y2="{self._height - _BOTTOM}"/>'
            f'<text class="small" x="{px + shift:.1f}" y="{_TOP + 9}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def svg(self) -> str:
        """The element."""
        parts = [
            f'<svg viewBox="0 0 {self._width} {self._height}" role="img" aria-label="{escape(self._title)}">',
            f'<text class="plot-title" x="{_LEFT}" y="14">{escape(self._title)}</text>',
            *self._grid(),
            *self._marks,
            *self._names(),
            "</svg>",
        ]
        return "".join(parts)

    def _grid(self) -> list[str]:
        bottom, right = self._height - _BOTTOM, self._width - _RIGHT
        parts = []
        for value in self._y.ticks(5):
            y = self._py(value)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{self._y.show(value)}</text>'
            )
        for value in self._x.ticks():
            x = self._px(value)
            parts.append(
                f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
                f'<text class="tick" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{self._x.show(value)}</text>'
            )
        middle = (_TOP + bottom) / 2
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        parts.append(
            f'<text class="label" x="{(_LEFT + right) / 2:.1f}" y="{self._height - 6}" text-anchor="middle">'
            f"{escape(self._x.label)}</text>"
            f'<text class="label" transform="translate(12 {middle:.1f}) rotate(-90)" text-anchor="middle">'
            f"{escape(self._y.label)}</text>"
        )
        return parts

    def _names(self) -> list[str]:
        parts, x = [], float(_LEFT)
        for css, text in self._legend:
            parts.append(f'<rect class="{css}" x="{x:.1f}" y="22" width="10" height="9"/>')
            parts.append(f'<text class="small" x="{x + 14:.1f}" y="30">{escape(text)}</text>')
            x += 14 + 5.8 * len(text) + 16
        return parts
