"""Templates escape what they are given and miss nothing; figures are the same bytes each time."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jinja2
import pytest

from pear_megatron.pages.figures import (
    in_both_widths,
    line_style,
    literal,
    new_figure,
    tidy,
    to_svg,
    write_png,
)
from pear_megatron.pages.page import render


def drawn(label: str = "arm"):
    figure = new_figure(4.0, 2.5)
    axes = figure.subplots()
    axes.plot([0, 1], [1, 2], marker="o", label=literal(label), **line_style(2))
    tidy(axes)
    axes.legend()
    return figure


def test_a_figure_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    assert to_svg(drawn(), "A") == to_svg(drawn(), "A")
    for name in ("a.png", "folder/b.png"):
        write_png(drawn(), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "folder" / "b.png").read_bytes()


def test_a_figure_in_a_page_takes_the_pages_colours_and_leaves_names_alone() -> None:
    svg = to_svg(drawn("fill #0072b2 <b>"), "A & B")
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == "A & B"
    assert "stroke: var(--blue)" in svg
    assert "stroke: #0072b2" not in svg
    assert "fill #0072b2 <b>" in [text.text for text in root.iter("text")]


def test_two_figures_of_a_page_share_no_ids() -> None:
    first, second = (
        {element.get("id") for element in ElementTree.fromstring(to_svg(drawn(), title)).iter()} - {None}
        for title in ("A", "B")
    )
    assert first
    assert not first & second


def test_a_figure_in_both_widths_is_drawn_twice_with_ids_of_their_own() -> None:
    both = ElementTree.fromstring(f"<p>{in_both_widths(lambda narrow: drawn(), 'A')}</p>")
    assert [svg.get("class") for svg in both] == ["broad", "narrow"]
    first, second = ({element.get("id") for element in svg.iter()} - {None} for svg in both)
    assert first
    assert not first & second


def test_a_name_that_the_context_lacks_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="verdicts"):
        render("inspect.html", title="<data>", facts=[])
