"""The docs' figures and the committed results agree; every kind of result has a table and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ABOUT = {
    "hardware": "a machine",
    "versions": {"torch": "2"},
    "command": "python x.py",
    "skipped": {"peer": "why"},
}
STEP = {"name": "ours", "tokens": 4096, "ms": 10.0, "peak_bytes": 3_000_000_000}
LAYER = {"hidden": 8, "columns": 16, "dtype": "bf16", "logits_bytes": 1000, "tokens": 4}
RECORDS: dict[str, dict[str, Any]] = {
    "step-1b-cuda": {
        **ABOUT,
        "model": "1b",
        "rows": [STEP, {"name": "theirs", "tokens": 4096, "error": "out of memory"}],
        "longest": {"ours": 8192, "theirs": 4096},
        "longest_unit": 4096,
        "longest_limit": 8192,
    },
    "output_layer-cuda": {
        **ABOUT,
        "rows": [
            {**LAYER, "name": "the three GEMMs alone", "ms": 2.0},
            {**LAYER, "name": "ours", "ms": 3.0, "peak_bytes": 500},
            {**LAYER, "name": "theirs", "error": "out of memory"},
        ],
    },
    "real_model-cuda": {
        **ABOUT,
        "model": "SmolLM2",
        "rows": [
            {"name": "before", "solved": [0.1, 0.05, 0.2]},
            {"name": "PEAR token", "tokens_per_second": 1e4, "nll": 0.5, "solved": [0.2, 0.1, 0.3]},
            {"name": "TRL", "error": "no"},
        ],
    },
    "attention-cuda": {
        **ABOUT,
        "model": "2 heads",
        "rows": [
            {"name": "varlen", "tokens": 1024, "ms": 5.0, "peak_bytes": 3_000_000},
            {"name": "mask", "tokens": 16384, "error": "out of memory"},
        ],
    },
    "token_losses-cuda": {
        **ABOUT,
        "rows": [{"name": "KL", "tokens": 4, "columns": 9, "dtype": "bf16", "ms": 1.5, "times_nll": 1.2}],
    },
    "cli-cpu": {**ABOUT, "rows": [{"name": "plan --help", "ms": 301.2, "processor_ms": 250.6}]},
    "lora-cpu": {
        **ABOUT,
        "rows": [{"name": "LoRA", "evaluations": [{"step": 0, "nll": 1.1}, {"step": 200, "nll": 0.08}]}],
    },
}


def test_the_pages_show_what_the_committed_results_say():
    """After a change: python benchmarks/table.py --write."""
    from table import PAGE, PAGES, page_section, with_section

    assert with_section(PAGE.read_text()) == PAGE.read_text()
    for name, page in PAGES.items():
        assert with_section(page.read_text(), page_section(name)) == page.read_text()


def test_every_picture_of_the_results_is_there():
    from table import PAGES, committed, kind

    for path in committed():
        assert kind(path) in PAGES or (ROOT / "docs" / "images" / f"{path.stem}.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("stem", "said"),
    [
        ("step-1b-cuda", ["| ours | 4096 | 10 | 409600 | 3.00 |", "theirs | 4096 | out of memory"]),
        ("step-1b-cuda", ["- ours: 8192, the longest tried", "- theirs: 4096\n"]),
        ("output_layer-cuda", ["| ours | 3 | 1.50 | 0 | 0.500 |", "Not run: peer (why)."]),
        ("attention-cuda", ["| 1024 | varlen | 5 | 3 |", "| 16384 | mask | out of memory | - |"]),
        ("cli-cpu", ["| plan --help | 301 | 251 |"]),
        ("lora-cpu", ["| held-out NLL after step | 0 | 200 |", "| LoRA | 1.100 | 0.080 |"]),
        ("real_model-cuda", ["| PEAR token | 1e+04 | 0.5 | 20.0% | 10.0% to 30.0% |", "| TRL | no |"]),
    ],
)
def test_tables_of_every_kind(stem: str, said: list[str]):
    from table import TABLES, kind

    text = TABLES[kind(Path(stem))](RECORDS[stem]) + "\n"
    for words in said:
        assert words in text


@pytest.mark.parametrize("stem", [stem for stem in RECORDS if not stem.startswith(("attention", "lora"))])
def test_plots_of_every_kind(tmp_path: Path, stem: str):
    from plots import plot_record
    from table import kind

    picture = tmp_path / "picture.png"
    plot_record(json.loads(json.dumps(RECORDS[stem])), kind(Path(stem)), picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
