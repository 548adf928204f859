"""The pages of eval and eval-compare: verdicts with remedies, numbers, and text as it is."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

pytest.importorskip("scipy", reason="needs the extra eval")

from pear_megatron.evaluate.page import page_of_one, page_of_two
from pear_megatron.evaluate.paired import compare
from pear_megatron.evaluate.results import ProblemResult, Results
from pear_megatron.evaluate.verdicts import about_one, about_two

SETTINGS = {"model": "/models/<b>&sft", "num_samples": 4, "temperature": 1.0, "max_new_tokens": 9}


def results(right: list[int], truncated: float = 0.0) -> Results:
    problems = [ProblemResult(f"p{i}", c, c / 4, 5.0, truncated) for i, c in enumerate(right)]
    return Results(SETTINGS, 1.0, [1, 4], problems)


def test_scores_on_another_scale_are_noticed() -> None:
    problems = [ProblemResult(f"p{i}", 4, 7.5, 5.0, 0.0) for i in range(40)]
    assert about_one(Results(SETTINGS, 1.0, [1, 4], problems))[0].title == "scores above 1"
    assert "scores above 1" not in [v.title for v in about_one(Results(SETTINGS, 10.0, [1, 4], problems))]


def parse(page: str) -> ElementTree.Element:
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


@pytest.mark.parametrize(
    ("right", "truncated", "titles"),
    [
        ([0] * 40, 0.0, ["nothing solved"]),
        ([4] * 40, 0.0, ["everything solved"]),
        ([0, 4] * 200, 0.5, ["responses cut off", "little for RL to tell apart"]),
        ([2] * 40, 0.1, ["responses cut off", "problems that RL can learn from"]),
        ([0, 4, 2], 0.0, ["a wide interval", "problems that RL can learn from"]),
    ],
)
def test_verdicts_of_one_evaluation(right: list[int], truncated: float, titles: list[str]) -> None:
    found = about_one(results(right, truncated))
    assert [
        verdict.title
        for verdict in found
        if verdict.title != "a wide interval" or "a wide interval" in titles
    ] == (titles)
    assert all(verdict.change for verdict in found)


def test_verdicts_of_two_evaluations() -> None:
    a, b = results([1] * 40), results([1, 2] * 20)
    (clear,) = about_two(("a", "b"), ([a], [b]), compare([a], [b]))
    assert clear.title == "b is better"
    (back,) = about_two(("b", "a"), ([b], [a]), compare([b], [a]))
    assert back.title == "b is better"
    c = results([0, 2, 1] * 13 + [2])
    (vague,) = about_two(("a", "c"), ([a], [c]), compare([a], [c]))
    assert vague.title == "no clear difference"
    assert vague.change.startswith("About ")


def test_the_page_shows_a_response_of_each_kind_as_it_is() -> None:
    row = {"score": 0.0, "truncated": False, "tokens": [1, 2]}
    rows = [
        {**row, "id": "p1", "response": "x" * 4000, "truncated": True},
        {**row, "id": "p0", "response": "<script>\n&"},
        {**row, "id": "p2", "response": "7", "score": 1.0},
        {**row, "id": "p3", "response": "not shown"},
    ]
    page = page_of_one(results([1, 0, 2]), rows)
    texts = [
        "".join(div.itertext()) for article in parse(page).iter("article") for div in article.iter("div")
    ]
    assert texts[:2] == ["7", "<script>\n&"]
    assert texts[2] == "x" * 1500 + " … 2,500 more characters"
    assert "not shown" not in page
    assert "<script" not in page


def test_the_page_of_two_says_how_many_responses_each_arm_drew() -> None:
    a, b = results([1, 0, 4] * 20), results([2, 0, 4] * 20)
    fewer = replace(a, settings={**SETTINGS, "num_samples": 8})
    assert "60, 4 or 8 responses to each" in page_of_two(("a", "b"), ([fewer], [b]), compare([fewer], [b]))


def test_the_page_of_two_shows_what_moved_and_bold_differences() -> None:
    a, b = results([1, 0, 4] * 20), results([2, 0, 4] * 19 + [2, 3, 4])
    root = parse(page_of_two(("runs/a", "runs/b"), ([a], [b]), compare([a], [b])))
    assert [section.get("id") for section in root.iter("section")][:2] == ["verdicts", "measures"]
    strong = ["".join(element.itertext()) for element in root.iter("strong")]
    assert any(text.startswith("+0.09") for text in strong)
    rows = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
    assert ["p58", "0%", "75%", "+75 points"] in rows
