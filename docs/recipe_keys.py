"""Makes docs/recipe-keys.md from the classes that read recipes and their docstrings.

python docs/recipe_keys.py
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pear_megatron.compare.recipe import CompareRecipe
from pear_megatron.problems.problem import ProblemsConfig
from pear_megatron.recipe.sections import Recipe
from pear_megatron.rl.trl.recipe import TrlRecipe

PAGE = Path(__file__).parent / "recipe-keys.md"
RECIPES: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("Training", "`python -m pear_megatron.train --config`, `plan --config`, `inspect --config`.", Recipe),
    ("Comparison", "`pear-megatron compare --config`; [compare](compare.md) has an example.", CompareRecipe),
    (
        "GRPO with TRL",
        "`pear-megatron grpo --engine trl --config`; `data.train` and `data.validation` are [problems](#problems).",
        TrlRecipe,
    ),
    ("Problems", "`pear-megatron eval --problems`, and the `data` of GRPO with TRL.", ProblemsConfig),
)
INTRO = """\
# Recipe keys

Every key of every YAML file that this package reads: made by `python docs/recipe_keys.py` from the classes that check
them. An unknown key is an error that suggests the closest one. On the command line a key is written with dots:
`train.max_steps=100`, `data.train=[a.parquet,b.parquet]`. NeMo-RL's recipes have NeMo-RL's own keys ([grpo](grpo.md)).
"""
_TYPES = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Any: "anything",
}
METHOD = "method.md"
HEADINGS = re.findall(r"^#+ (.+)$", (PAGE.parent / METHOD).read_text(), re.MULTILINE)
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The class of a key that is a section of its own, optional or not."""
    found = [
        a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)
    ]
    return found[0] if found and get_origin(annotation) in (None, Union, types.UnionType) else None


def type_name(annotation: Any) -> str:
    """A type in the words of someone who writes YAML."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(part) for part in inner)
    if origin is tuple and Ellipsis not in inner:
        return f"[{', '.join(type_name(part) for part in inner)}]"
    if origin in (list, tuple):
        element = type_name(inner[0])
        return f"list of {element}" if get_origin(inner[0]) is not Literal else f"list: {element}"
    if origin is dict:
        return f"mapping to {type_name(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    return _TYPES[annotation]


def bounds(field: FieldInfo) -> str:
    """Limits of a number: ", > 0"."""
    return "".join(
        f", {sign}\u00a0{getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in _BOUNDS.items()
        if hasattr(limit, name)
    )


def default_of(field: FieldInfo) -> str:
    """The default as YAML has it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    value = list(value) if isinstance(value, tuple) else value
    return "`" + yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n")[0] + "`"


def explanations(section: type[BaseModel]) -> dict[str, str]:
    """What the docstring's Attributes say of each key; keys that are explained together share the text."""
    doc = inspect.getdoc(section) or ""
    _, _, attributes = doc.partition("Attributes:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n    (?=\w)", "\n" + attributes.split("\n\n")[0])[1:]:
        names, _, text = entry.partition(": ")
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def as_markdown(text: str) -> str:
    """A docstring's text: code, links into docs/, and YAML's words for None, True and False."""
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    for heading in HEADINGS:
        anchor = heading.lower().replace(" ", "-")
        text = text.replace(f"docs/{METHOD}, {heading}", f"[method, {heading}]({METHOD}#{anchor})")
    text = re.sub(r"docs/([\w-]+)\.md", _link, text)
    for word in ("None", "True", "False"):
        in_yaml = "null" if word == "None" else word.lower()
        text = re.sub(rf"\b{word}\b", f"`{in_yaml}`", text)
    return text.replace("|", r"\|").replace("<", "&lt;")


def _link(match: re.Match[str]) -> str:
    return f"[{match[1]}]({match[1]}.md)" if (PAGE.parent / f"{match[1]}.md").exists() else match[0]


def summary(section: type[BaseModel]) -> str:
    """The docstring's first paragraph."""
    return as_markdown(" ".join((inspect.getdoc(section) or "").split("\n\n")[0].split()))


def tables(section: type[BaseModel], path: str = "") -> Iterator[str]:
    """The table of a section's own keys, then those of its sections, each under a heading."""
    said = explanations(section)
    rows, below = [], []
    for key, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is ProblemsConfig:  # has a heading of its own
            inner = None
            cells = ["problems", default_of(field), as_markdown(said.get(key, ""))]
        elif inner is not None:
            whole = not field.is_required() and field.default is None
            below.append((key, inner, f"`{path}{key}`: {as_markdown(said[key])}\n\n" if whole else ""))
            continue
        else:
            kind = type_name(field.annotation) + bounds(field)
            cells = [kind, default_of(field), as_markdown(said.get(key, ""))]
        rows.append(f"| `{key}` | {' | '.join(cells)} |")
    if rows:
        yield "\n".join(["| key | type | default | |", "| --- | --- | --- | --- |", *rows])
    for key, inner, optional in below:
        yield f"### {path}{key}\n\n{optional}{summary(inner)}"
        yield from tables(inner, f"{path}{key}.")


def page() -> str:
    """The whole page."""
    parts = [INTRO.strip()]
    for title, where, recipe in RECIPES:
        parts += [f"## {title}\n\n{where}", *tables(recipe)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
