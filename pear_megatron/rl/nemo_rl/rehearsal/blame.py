"""From an error of NeMo-RL's to the line that raised it and the recipe's keys that it is about."""

from __future__ import annotations

import ast
import re
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_DOTTED = re.compile(r"\b(?:policy|grpo|loss_fn|data|env|logger|cluster|checkpointing)(?:\.\w+)+")


def raised_at(error: BaseException, root: Path) -> tuple[Path, int] | None:
    """File and line of the innermost frame that is NeMo-RL's."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(root) and frame.lineno:
            return path, frame.lineno
    return None


def keys_of(
    error: BaseException, at: tuple[Path, int], recipe: dict[str, Any], about: Iterable[str]
) -> list[str]:
    """The recipe's keys that an error is about, most certain sources first.

    Args:
        error: raised by NeMo-RL.
        at: its line, from ``raised_at``.
        recipe: the whole configuration; empty before it is loaded.
        about: keys that the failing part depends on.
    """
    known, text = leaves(recipe), str(error)
    if (
        isinstance(error, KeyError) and error.args
    ):  # of a value that NeMo-RL has no entry for, or a key it misses
        if found := [key for key, value in known.items() if value == error.args[0]]:
            return found
        return list(about) or [str(error.args[0])]
    words = {word for word in re.findall(r"\w+", text) if "_" in word}
    dotted = {key for key in _DOTTED.findall(text) if key in known or not known}
    if found := sorted(_named(words, known) | dotted):
        return found
    if found := [key for key, value in known.items() if isinstance(value, str) and _quoted(value, text)]:
        return found
    if about:
        numbers = set(re.findall(r"\d+", text))
        return [key for key in about if str(known.get(key)) in numbers] or list(about)
    words = _words_behind(*at)
    return sorted(key for key in _named(words, known) if _is_there(key, words))


def _is_there(key: str, words: set[str]) -> bool:
    """Whether code that has the key's last part means this key: it also has the section's name, if that is deep."""
    section = key.split(".")[:-1]
    return len(section) == 1 or section[0] == "data" or section[-1] in words


def _quoted(value: str, text: str) -> bool:
    return value != "" and re.search(rf"(?:['\"=]|: ){re.escape(value)}(?![\w/])", text) is not None


def leaves(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; without sections that are switched off."""
    found: dict[str, Any] = {}
    for key, below in value.items():
        if isinstance(below, dict) and below:
            off = key.endswith("_cfg") and below.get("enabled") is False
            found |= {f"{prefix}{key}.enabled": False} if off else leaves(below, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = below
    return found


def _named(words: set[str], known: Iterable[str]) -> set[str]:
    """Keys whose last part is among the words; of namesakes, those with the most parts there."""
    by_name: dict[str, list[tuple[int, str]]] = {}
    for key in known:
        parts = key.split(".")
        name = ".".join(parts[-2:]) if parts[-1] in ("enabled", "name") else parts[-1]
        if words.issuperset(name.split(".")) or (parts[-1] == "enabled" and parts[-2] in words):
            by_name.setdefault(name, []).append((len(words.intersection(parts)), key))
    return {key for namesakes in by_name.values() for score, key in namesakes if score == max(namesakes)[0]}


def _words_behind(path: Path, line: int) -> set[str]:
    """Names and strings of the condition that failed at a line, and of what its variables were assigned from."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    function = max((f for f in functions if _spans(f, line)), key=lambda node: node.lineno, default=None)
    if function is None:
        return set()
    assigned: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and node.lineno < line:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                assigned.setdefault(ast.unparse(target), []).append(node.value)
    words, seen, todo = set[str](), set[str](), list(_conditions(function, line))
    while todo:
        for node in ast.walk(todo.pop()):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
            elif isinstance(node, ast.Name | ast.Attribute):
                words.add(node.attr if isinstance(node, ast.Attribute) else node.id)
                if (name := ast.unparse(node)) not in seen:
                    seen.add(name)
                    todo += assigned.get(name, [])
    return words


def _conditions(function: ast.FunctionDef, line: int) -> Iterator[ast.AST]:
    """What an assertion asserts or a failed statement computes, and the innermost ``if`` around it."""
    around = [node for node in ast.walk(function) if isinstance(node, ast.stmt) and _spans(node, line)]
    statement = max(around, key=lambda node: node.lineno)
    yield from [node.test for node in around if isinstance(node, ast.If) and node is not statement][-1:]
    if isinstance(statement, ast.Assert | ast.If):
        yield statement.test
    elif not isinstance(statement, ast.Raise):
        yield statement


def _spans(node: ast.stmt, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)
