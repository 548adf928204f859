"""The source cites docs/method.md by heading, and the headings are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("pear_megatron", "csrc", "tests", "benchmarks", "examples", "recipes", "docs")
SUFFIXES = {".py", ".h", ".inl", ".cpp", ".cu", ".md", ".json", ".yaml"}
CITATION = re.compile(r"docs/method\.md, (.{40})")


def sources() -> list[Path]:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return [*files, *ROOT.glob("*.md")]


def one_line(text: str) -> str:
    """Comments of several lines joined, so that a citation may go over a line's end."""
    return re.sub(r"\s*\\?\n[\s/#*]*", " ", text)


def headings() -> list[str]:
    return re.findall(r"^#+ (.+)$", (ROOT / "docs" / "method.md").read_text(), re.MULTILINE)


def unknown_headings(text: str) -> list[str]:
    cited = CITATION.findall(one_line(text) + " " * 40)
    return [words for words in cited if not words.startswith(tuple(headings()))]


def test_every_citation_of_the_method_names_a_heading():
    found = {str(path): unknown_headings(path.read_text()) for path in sources() if path != Path(__file__)}
    assert {path: words for path, words in found.items() if words} == {}


def test_the_method_is_cited():
    assert sum(len(CITATION.findall(one_line(path.read_text()))) for path in sources()) > 10


@pytest.mark.parametrize(
    "text",
    ["(docs/method.md, Wieghts)", "docs/method.md, Where it\n// went wrong", "docs/method.md, \\\n  Words,"],
)
def test_a_heading_that_is_not_there_is_found(text: str):
    assert bool(unknown_headings(text)) == ("Words" not in text)


def test_nothing_cites_a_file_that_is_not_in_the_repository():
    absent = re.compile(r"\b(METHOD|DESIGN)(\.md\b|: )")
    assert [str(path) for path in sources() if absent.search(one_line(path.read_text()))] == []
