"""What docs/datasets.md says of published data sets, on a row of each set's shape."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_rows import ROWS

from pear_megatron.data import DataConfig, Trajectory, TrajectoryDataset, prepare

PAGE = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()
# (data set, the line or the name of the function that converts; None = as they are) of each line of the tables.
LINES = [
    (
        re.findall(r"`([\w.-]+/[\w.-]+)`", sets)[0],
        None if convert.startswith("as it is") else convert.strip("`"),
    )
    for sets, convert in re.findall(r"^\| (`[\w.-]+/.*?) \| (.*?) \| ", PAGE, flags=re.MULTILINE)
]


@pytest.fixture(scope="module")
def functions() -> dict[str, Any]:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Callable[..., Any]) -> Any:
    trl = pytest.importorskip("trl")
    made = byte_tokenizer((Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text())
    made.name_or_path = str(tmp_path_factory.mktemp("tokenizer"))
    made.save_pretrained(made.name_or_path)
    return made


def trained(tokenizer: Any, trajectories: list[Trajectory]) -> list[str]:
    """The decisions, turn by turn, without the token that ends a turn."""
    found = []
    for one in trajectories:
        first = np.flatnonzero(one.loss_mask & ~np.roll(one.loss_mask, 1))
        last = np.flatnonzero(one.loss_mask & ~np.roll(one.loss_mask, -1))
        texts = [
            tokenizer.decode(one.input_ids[a : b + 1].tolist()) for a, b in zip(first, last, strict=True)
        ]
        assert all(text.endswith("<|im_end|>") for text in texts)
        found += [text.removesuffix("<|im_end|>") for text in texts]
    return found


def test_every_data_set_of_the_page_has_a_row_here() -> None:
    assert sorted(name for name, _ in LINES) == sorted(ROWS)


@pytest.mark.parametrize(("name", "convert"), LINES, ids=[name for name, _ in LINES])
def test_a_row_is_trained_on_what_was_answered(
    name: str,
    convert: str | None,
    functions: Mapping[str, Any],
    tokenizer: Any,
    tmp_path: Path,
    config: Callable[..., DataConfig],
) -> None:
    datasets = pytest.importorskip("datasets")
    row, answers, context = ROWS[name]
    rows = datasets.Dataset.from_list([row])
    if convert is not None:
        make = functions.get(convert) or eval(f"lambda row: {convert}")
        rows = rows.map(make, remove_columns=rows.column_names)
    rows.to_parquet(tmp_path / "a.parquet")
    settings = {"tokenizer": tokenizer.name_or_path, "seq_length": 8192}
    found = list(
        TrajectoryDataset.open(
            prepare(config(tmp_path / "a.parquet", **settings), require_behavior_logprobs=False)
        )
    )
    assert trained(tokenizer, found) == answers
    text = tokenizer.decode(found[-1].input_ids.tolist())
    for part in context:
        assert part in text
