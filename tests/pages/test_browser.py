"""The pages in a real browser, at a desk's width and a telephone's, light and dark.

No picture of a whole page is committed to compare with: fonts, and with them every line break, differ from machine to
machine. What is compared are screenshots of the pictures, light with dark, and what the browser measured.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("scipy", reason="needs the extra eval")
pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")

from playwright.sync_api import sync_playwright

from pear_megatron.cli import app
from pear_megatron.compare.page import page as compare_page
from pear_megatron.evaluate.page import page_of_one, page_of_two
from pear_megatron.evaluate.paired import compare
from pear_megatron.evaluate.results import ProblemResult, Results
from tests.byte_tokenizer import save_byte_tokenizer
from tests.compare import made
from tests.inspect.scored_rows import scored
from tests.structured import write_rows

MEASURE = (Path(__file__).parent / "measure.js").read_text()
WIDTHS, SCHEMES = (1280, 400), ("light", "dark")
ARMS = ["SFT", "PEAR token", "PEAR sequence", "the same weights, shuffled", "no offline phase at all"]
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--no-first-run",
]


def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs a browser: apt-get install --no-install-recommends chromium")
    return found


def inspect_page(folder: Path) -> str:
    rows = scored(lambda lb, rng: lb - 0.3 + rng.gauss(0, 1), tokens=90, count=12)
    rows[0]["reward"] = -0.5
    rows[1]["id"] = "a-rather-long-identifier/of-a-trajectory/" * 3
    data, tokenizer = write_rows(folder / "data.jsonl", rows), save_byte_tokenizer(folder / "bytes")
    output = folder / "made.html"
    words = ["inspect", str(data), "--scored", "--tokenizer", str(tokenizer), "--output", str(output)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return output.read_text()


def comparison_page(folder: Path) -> str:
    arms = {name: None if name.startswith("no") else ["pear.gamma=0.999"] for name in ARMS}
    recipe = made.recipe(folder, seeds=[0, 1, 2], arms=arms, tune=None)
    steps = np.arange(40)
    curves = {
        arm: [list(0.6 / (1 + np.exp(-(steps - 20 + 3 * i - seed) / 4))) for seed in range(3)]
        for i, arm in enumerate(ARMS)
    }
    return compare_page(made.outcome(recipe, curves))


def evaluation(shift: float) -> Results:
    right = np.random.default_rng(0).binomial(8, np.linspace(0, 1 - shift, 40))
    problems = [ProblemResult(f"gsm8k/test/{i}", int(c), c / 8, 30.0, 0.1) for i, c in enumerate(right)]
    settings = {"model": "/models/exports/a-model-with-a-long-name-7b", "num_samples": 8, "temperature": 1.0}
    return Results(settings | {"top_p": 1.0, "max_new_tokens": 64}, 1.0, [1, 8], problems)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    a, b = evaluation(0.2), evaluation(0.0)
    names = ("results/eval/plain-sft", "results/eval/pear-token-symmetric-clip")
    row = {"id": "p", "truncated": False, "tokens": [1], "score": 0.0}
    texts = {
        "inspect": inspect_page(folder),
        "compare": comparison_page(folder),
        "eval": page_of_one(a, [{**row, "response": "words and " + "one_long_word" * 20}]),
        "eval-compare": page_of_two(names, ([a], [b]), compare([a], [b])),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text)
    return {name: folder / f"{name}.html" for name in texts}


Seen = dict[tuple[str, int, str], dict[str, Any]]


@pytest.fixture(scope="module")
def seen(pages: dict[str, Path]) -> Seen:
    """What the browser measured of each page, width and scheme; the narrow ones with a screenshot."""
    found: Seen = {}
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium(), args=OPTIONS)
        for width in WIDTHS:
            for scheme in SCHEMES:
                tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                for name, path in pages.items():
                    tab.goto(path.as_uri())
                    found[name, width, scheme] = tab.evaluate(MEASURE)
                    if width == min(WIDTHS):
                        found[name, width, scheme]["png"] = tab.screenshot(full_page=True)
                tab.close()
        browser.close()
    return found


def wrong(seen: Seen, what: str, is_wrong: Any) -> list[tuple[Any, ...]]:
    """Where an item of a list is wrong: page, width, scheme, item."""
    return [(*key, item) for key, page in seen.items() for item in page[what] if is_wrong(item)]


def test_no_page_is_wider_than_its_window(seen: Seen) -> None:
    assert {key: page["overflow"] for key, page in seen.items() if page["overflow"] > 0} == {}


def test_no_text_is_cut_off(seen: Seen) -> None:
    assert wrong(seen, "texts", lambda text: text["cut"]) == []
    for (_, width, _), page in seen.items():
        outside = [t for t in page["texts"] if not t["scrolls"] and not 0 <= t["left"] <= t["right"] <= width]
        assert outside == []


def test_labels_of_pictures_are_inside_them_and_large_enough_to_read(seen: Seen) -> None:
    assert len(wrong(seen, "pictures", lambda picture: len(picture["texts"]) > 5)) >= 4 * (8 + 2 + 2 + 2)
    for key, page in seen.items():
        for picture in page["pictures"]:
            texts = picture["texts"]
            assert [t for t in texts if t["out"] > 2] == [], (key, picture["name"])
            assert [t for t in texts if t["size"] < 7.5] == [], (key, picture["name"])


def test_every_arm_is_in_the_legend_of_the_picture_that_is_shown(seen: Seen) -> None:
    for width in WIDTHS:
        curves, seeds = seen["compare", width, "light"]["pictures"]
        assert [curves["name"], seeds["name"]] == ["Learning curves", "Every seed"]
        texts = [text["text"].replace("\u200b", "") for text in curves["texts"]]
        assert set(ARMS) <= set(texts)
        assert "take-off" in texts


def test_dark_is_dark_and_light_is_light(seen: Seen) -> None:
    for (_, _, scheme), page in seen.items():
        assert page["ground"] < 0.02 if scheme == "dark" else page["ground"] > 0.85


def test_text_and_lines_stand_out_from_what_is_under_them(seen: Seen) -> None:
    """At least as WCAG 2.2 asks, level AA: 4.5 for text, 3 for what a picture is drawn with."""
    assert wrong(seen, "texts", lambda text: text["contrast"] < 4.5) == []
    for key, page in seen.items():
        assert {name: value for name, value in page["lines"].items() if value < 3} == {}, key


def test_dark_differs_from_light_in_colours_alone(seen: Seen) -> None:
    for name, width, _ in seen:
        assert seen[name, width, "dark"]["boxes"] == seen[name, width, "light"]["boxes"]


def test_a_picture_shows_as_much_in_the_dark_as_in_the_light(seen: Seen) -> None:
    """The share of a picture's pixels that stand out from its ground; nothing is drawn in a colour that vanishes."""
    for name in sorted({name for name, *_ in seen}):
        light, dark = (seen[name, min(WIDTHS), scheme] for scheme in SCHEMES)
        for picture, there, here in zip(light["pictures"], shares(light), shares(dark), strict=True):
            assert there > 0.01, (name, picture["name"])
            assert 0.6 < here / there < 1.7, (name, picture["name"])


def shares(page: dict[str, Any]) -> list[float]:
    shot = np.asarray(Image.open(io.BytesIO(page["png"])).convert("L"), dtype=np.int16)
    return [drawn(shot, picture) for picture in page["pictures"]]


def drawn(shot: np.ndarray, box: dict[str, float]) -> float:
    x, y = round(box["x"]), round(box["y"])
    part = shot[y : y + round(box["height"]), x : x + round(box["width"])]
    return float((abs(part - np.median(shot[y, x : x + 5])) > 40).mean())


def test_every_verdict_has_its_remedy(seen: Seen) -> None:
    for (name, *_), page in seen.items():
        assert page["verdicts"], name
        assert all(page["verdicts"]), name
