"""Imports of the package run one way, and Megatron-Core is met in one place."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pear_megatron"
# Files outside pear_megatron/megatron that import megatron, and why.
MEETS_MEGATRON = {
    "adapters/bridge/dataset.py": "megatron.bridge, whose dataset config it is",
    "adapters/bridge/loop.py": "megatron.bridge, the loop that it plugs into",
    "adapters/megatron_lm.py": "megatron.training, the loop that it plugs into",
    "adapters/megatron_lm_model.py": "megatron.training, whose model it describes",
    "adapters/slime/loss.py": "slime's process groups are Megatron's global ones",
    "adapters/swift/trainer.py": "ms-swift's process groups are Megatron's global ones",
    "hf/bridge.py": "Megatron-Bridge, for architectures that this package does not know",
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its head or inside a function; not what only a type checker reads."""
    tree = ast.parse(path.read_text())
    unread = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module


def graph(part: str) -> dict[str, set[str]]:
    """The package's files (``part`` = file) or folders and their imports; the lazy public API is no part."""
    edges: dict[str, set[str]] = defaultdict(set)
    for name, path in FILES.items():
        for imported in imports(path):
            if imported not in FILES or "pear_megatron" in (name, imported):
                continue
            one, other = (name, imported) if part == "file" else (folder(name), folder(imported))
            if one != other:
                edges[one].add(other)
    return edges


def folder(name: str) -> str:
    """``data`` for pear_megatron.data.files; a file at the package's top stands for itself."""
    return name.split(".")[1]


@pytest.mark.parametrize("part", ["file", "folder"])
def test_imports_run_one_way(part: str) -> None:
    try:
        TopologicalSorter(graph(part)).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(reversed(error.args[1]))}")


def test_megatron_is_imported_in_its_folder_alone() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for name, path in FILES.items()
        if folder(name + ".") != "megatron"
        for imported in imports(path)
        if imported.split(".")[0] == "megatron"
    }
    assert found == set(MEETS_MEGATRON)


def test_nothing_but_the_method_and_the_ground_floor_stands_at_the_top() -> None:
    method = {"config", "weights", "loss", "report", "alignment", "alignment_watch"}
    ground_floor = {
        "__init__",
        "cli",
        "errors",
        "interrupt",
        "lazy",
        "progress",
        "ranks",
        "schema",
        "storage",
        "streams",
        "watch",
    }
    assert {path.stem for path in PACKAGE.glob("*.py")} == method | ground_floor


def test_text_files_are_read_and_written_as_utf_8_whatever_the_locale_says() -> None:
    found = []
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
                continue
            called = ast.unparse(node.func).rpartition(".")[2]
            modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            opens = called == "open" and any("b" not in mode for mode in modes)
            if called in ("read_text", "write_text") or opens:
                found.append(f"{name}:{node.lineno}")
    assert not found
