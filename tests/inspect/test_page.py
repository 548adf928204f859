"""The page is one well-formed file that needs nothing else, and shows every token as it is."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from pear_megatron.data import load_tokenizer
from pear_megatron.inspect.reading import pieces, shade
from tests.inspect.scored_rows import Inspect, scored

UNICODE = "Grüße, Ωμέγα \N{GRINNING FACE} 漢字 <script>alert('&')</script>\n\n\ttab"


def parse(page: str | None) -> ElementTree.Element:
    assert page is not None
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def text_of(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def noisy_rows(**options: int) -> list[dict[str, object]]:
    return scored(lambda lb, rng: lb + rng.gauss(-0.1, 0.3), **options)


def test_the_page_has_its_parts_and_needs_nothing_else(look: Inspect) -> None:
    rows = noisy_rows()
    for row in rows[:7]:
        row["reward"] = -0.5
    found = look(rows)
    root = parse(found.page)
    sections = [section.get("id") for section in root.iter("section")]
    assert sections == ["verdicts", "settings", "statistics", "charts", "trajectories"]
    figures = [svg.get("aria-label") for svg in root.iter("svg")]
    assert figures == [text_of(caption) for caption in root.iter("figcaption")]
    assert len(set(figures)) == 8
    assert len(list(root.iter("article"))) == 6
    assert "7 negative examples" in text_of(root)
    assert found.page is not None
    assert not re.search(r"https?://|<script|<link|<img|url\((?!#)|@import", found.page)
    assert len(found.page) < 300_000


def test_charts_name_their_marks_and_their_bounds_in_full(look: Inspect) -> None:
    rows = scored(lambda lb, rng: lb - 1 + rng.gauss(0, 1), tokens=300, count=8)
    rows[0]["reward"] = -0.5
    root = parse(look(rows, "pear.log_ratio_clip=[-0.08,0.3]").page)
    texts = {svg.get("aria-label"): [text_of(t) for t in svg.iter("text")] for svg in root.iter("svg")}
    assert {"clip -0.08", "clip 0.3", "reward at least 0", "negative examples"} <= set(texts["Log ratio"])
    assert "floor 4.5e-05" in texts["Weight"]
    bands = {"median", "middle 50%", "middle 80%"}
    assert bands | {"discount alone", "every ratio at the low clip"} <= set(
        texts["Weight and place, from the end"]
    )
    assert bands <= set(texts["Weight and place, relative"])


def test_ids_in_figures_are_not_shared_by_two_of_them(look: Inspect) -> None:
    ids = [element.get("id") for svg in parse(look(noisy_rows()).page).iter("svg") for element in svg.iter()]
    found = [name for name in ids if name is not None]
    assert len(found) == len(set(found)) > 8


def test_the_same_data_give_the_same_page(look: Inspect) -> None:
    assert look(noisy_rows()).page == look(noisy_rows()).page


def test_thousands_of_tokens_stay_a_small_page(look: Inspect) -> None:
    found = look(noisy_rows(count=12, tokens=4000))
    assert found.page is not None
    assert len(found.page) < 2_000_000
    assert "tokens left out" in found.page
    parse(found.page)


@pytest.mark.parametrize("tokens", [5, 6])
def test_one_short_trajectory_is_enough(look: Inspect, tokens: int) -> None:
    found = look(noisy_rows(count=1, tokens=tokens))
    assert found.exit_code == 0, found.stderr
    assert len(list(parse(found.page).iter("article"))) == 1


def test_equal_weights_and_log_probs_can_be_drawn(look: Inspect) -> None:
    rows = scored(tokens=30, count=4)
    for row in rows:
        for name in ("behavior_logprobs", "policy_logprobs"):
            row[name] = [None if value is None else -1.0 for value in row[name]]
    parse(look(rows, "pear.gamma=1").page)


def test_every_decision_can_be_pointed_at_with_its_numbers(look: Inspect) -> None:
    rows = noisy_rows(count=1, tokens=20)
    page = parse(look(rows).page)
    tokens = [b for b in page.iter("b") if b.get("title")]
    assert [text_of(b).strip() for b in tokens] == [str(i) for i in rows[0]["input_ids"][4:]]
    lp, lb = rows[0]["policy_logprobs"][7], rows[0]["behavior_logprobs"][7]
    title = tokens[3].get("title") or ""
    assert f"lp {lp:.3f}, lb {lb:.3f}" in title
    assert tokens[-1].get("title", "").startswith("weight 1,")


def test_text_ids_and_names_are_escaped(look: Inspect, byte_folder: Path) -> None:
    tokenizer = load_tokenizer(str(byte_folder))
    rows = noisy_rows(count=1, tokens=60)
    ids = list(tokenizer(UNICODE)["input_ids"])[:56]
    rows[0] |= {"id": "<i>&'\"", "input_ids": rows[0]["input_ids"][:4] + (ids * 9)[:56]}
    page = look(rows, "--tokenizer", byte_folder).page
    assert "漢字 <script>" in text_of(parse(page)).replace("\N{RETURN SYMBOL}\n", "\n")
    assert "<i>&'\"" in text_of(parse(page))


def test_tokens_that_share_a_character_come_together_and_no_text_is_lost(byte_folder: Path) -> None:
    tokenizer = load_tokenizer(str(byte_folder))
    ids = tokenizer(UNICODE)["input_ids"]
    parts = list(pieces(ids, tokenizer))
    assert "".join(text for text, _ in parts) == UNICODE
    assert [i for _, members in parts for i in members] == list(range(len(ids)))
    assert ("\N{GRINNING FACE}", 4) in [(text, len(members)) for text, members in parts]


def test_a_real_tokenizers_spaces_survive(smollm2: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2))
    ids = tokenizer(UNICODE)["input_ids"]
    assert "".join(text for text, _ in pieces(ids, tokenizer)) == UNICODE


def test_shades_follow_the_weight() -> None:
    weights = [1e-9, 1e-3, 0.1, 0.5, 0.9, 1.0, 2.0, 10.0, 100.0]
    levels = [shade(weight, -10.0) for weight in weights]
    assert levels == sorted(levels)
    assert (levels[0], levels[5], levels[-1]) == (0, 10, 13)
