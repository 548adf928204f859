"""Whatever a recipe holds: a valid one, or a RecipeError; and nothing in YAML is run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pear_megatron.compare.recipe import load_compare_recipe
from pear_megatron.errors import RecipeError
from pear_megatron.problems.load import read_problems_config
from pear_megatron.recipe import load_recipe, to_yaml
from pear_megatron.rl.trl.recipe import load_trl_recipe
from tests.fuzz.values import damaged, damaged_bytes, examples, folder_alone, json_values

ROOT = Path(__file__).parents[2] / "recipes"
LOADERS: dict[str, Callable[..., Any]] = {
    "sft/tiny.yaml": load_recipe,
    "sft/qwen2.5-7b.yaml": load_recipe,
    "compare": load_compare_recipe,
    "grpo_trl": load_trl_recipe,
    "problems": lambda path: read_problems_config(str(path)),
}


def first(folder: str) -> Path:
    return sorted((ROOT / folder).glob("*.yaml"))[0]


def good(name: str) -> Any:
    path = ROOT / name if name.endswith(".yaml") else first("grpo_trl" if name == "problems" else name)
    values = yaml.safe_load(path.read_text())
    if isinstance(values.get("defaults"), str):
        values["defaults"] = str((path.parent / values["defaults"]).resolve())
    if name.startswith("sft"):
        values["data"] = {**values.get("data", {}), "train": "x.jsonl"}
    return values


GOOD = {name: good(name) for name in LOADERS}


def load_or_refuse(name: str, path: Path) -> None:
    try:
        found = LOADERS[name](path)
    except RecipeError as error:
        assert str(error)
    else:
        if name.startswith("sft"):
            path.write_text(to_yaml(found))
            assert load_recipe(path) == found


@pytest.mark.parametrize("name", LOADERS)
@examples(25)
@given(data=st.data())
def test_mappings(name: str, data: st.DataObject) -> None:
    values = data.draw(damaged(GOOD[name]) | json_values)
    with folder_alone() as folder:
        try:
            text = yaml.safe_dump(values)
        except yaml.YAMLError:
            return
        (folder / "a.yaml").write_text(text, errors="surrogatepass")
        load_or_refuse(name, folder / "a.yaml")


@examples(60)
@given(data=st.data(), name=st.sampled_from(list(LOADERS)))
def test_bytes(data: st.DataObject, name: str) -> None:
    with folder_alone() as folder:
        (folder / "a.yaml").write_bytes(data.draw(damaged_bytes(yaml.safe_dump(GOOD[name]).encode())))
        load_or_refuse(name, folder / "a.yaml")
