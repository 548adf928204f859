"""README and docs: what they name is there, what they show runs, and what is made from the source is current."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import pytest
import torch
import typer
import yaml

import pear_megatron
from pear_megatron.cli import app
from pear_megatron.recipe import load_recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
OWN_OPTIONS = {"train": {"--config", "--nproc-per-node"}}


def recipe_keys() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_keys", DOCS / "recipe_keys.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_is_short() -> None:
    assert len(README.read_text().split()) < 1000


def test_the_ten_lines_of_readme_run_as_they_stand() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(code, names)
    gradient = names["logits"].grad
    assert names["num_tokens"] == names["mask"].sum()
    assert torch.isfinite(gradient).all()
    assert (gradient.abs().sum(-1) > 0).equal(names["mask"])


def test_every_page_is_in_the_nav() -> None:
    def files(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [
            file for part in (entry.values() if isinstance(entry, dict) else entry) for file in files(part)
        ]

    named = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_the_page_of_recipe_keys_is_current_and_explains_every_key() -> None:
    """After a change: python docs/recipe_keys.py."""
    page = (DOCS / "recipe-keys.md").read_text()
    assert page == recipe_keys().page()
    assert re.findall(r"^\| `(\w+)` .*\|  \|$", page, flags=re.MULTILINE) == []


def test_the_api_page_names_what_is_exported() -> None:
    named = re.findall(r"^::: pear_megatron\.[\w.]*\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(pear_megatron.__all__)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def test_the_links_of_readme_lead_somewhere() -> None:
    """Those of the pages are checked by `make docs`."""
    for link in re.findall(r"\]\((?!https:)([^)]+)\)", README.read_text()):
        name, _, wanted = link.partition("#")
        assert (ROOT / name).exists(), link
        headings = re.findall(r"^#+ (.+)$", (ROOT / name).read_text(), re.MULTILINE) if wanted else []
        assert not wanted or wanted in map(anchor, headings), link


def test_the_pictures_of_readme_are_there_for_light_and_dark_and_show_the_same(tmp_path: Path) -> None:
    from PIL import Image, ImageChops

    from pear_megatron.pages.figures import write_dark_twin

    light = re.findall(r'<img src="([^"]+)"', README.read_text())
    dark = re.findall(r'media="\(prefers-color-scheme: dark\)" srcset="([^"]+)"', README.read_text())
    assert len(light) == len(dark) == 1
    copy = tmp_path / "picture.png"
    copy.write_bytes((ROOT / light[0]).read_bytes())
    made, kept = (Image.open(path).convert("RGB") for path in (write_dark_twin(copy), ROOT / dark[0]))
    assert ImageChops.difference(made, kept).getbbox() is None, "after a new picture: write_dark_twin"


def test_links_to_elsewhere_have_the_shape_of_addresses() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((\w+:[^)]*)\)", page.read_text()):
            address = urlsplit(link)
            assert address.scheme == "https", f"{page}: {link}"
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", address.netloc), f"{page}: {link}"
            assert not re.search(r"\s|[.,;]$", link), f"{page}: {link}"


def commands(text: str) -> list[list[str]]:
    """The words of every command of ours that a page shows, in a block or in a line."""
    text = re.sub(r" *\\\n *", " ", text)
    shown = re.findall(r"^ {4,}.*(?:\bpear-megatron |pear_megatron\.train ).*$", text, re.MULTILINE)
    shown += re.findall(r"`((?:pear-megatron|python -m pear_megatron\.train) [^`]*)`", text)
    ours = re.compile(r"(?:pear-megatron|-m pear_megatron\.(?=train))\s*([a-z][a-z-]*)( [^|;#]*)?")
    found = []
    for line in shown:
        if match := ours.search(line):
            quoted = (match[2] or "").replace("...", "")
            found.append([match[1], *(shlex.split(quoted) if quoted.count("'") % 2 == 0 else quoted.split())])
    return found


def test_every_command_of_the_docs_exists_with_its_options() -> None:
    known = {
        name: {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
    } | OWN_OPTIONS
    seen = 0
    for page in PAGES:
        for name, *words in commands(page.read_text()):
            assert name in known, f"{page}: pear-megatron {name}"
            options = {word.partition("=")[0] for word in words if word.startswith("--") and len(word) > 2}
            assert options <= known[name], f"{page}: {name} {' '.join(words)}"
            seen += len(options)
    assert seen > 80


def texts() -> str:
    """Every string of the package and its build as it is once Python has joined it, {} for what is filled in."""
    found = []
    for file in (ROOT / "setup.py", *(ROOT / "pear_megatron").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_source() -> None:
    said = texts().replace("{}", "")
    messages = re.findall(r"^\| `([^`]+)`", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 50
    assert [message for message in messages if message not in said] == []


@pytest.mark.parametrize("variant", ["token", "none"])
def test_the_recipe_of_the_guide_is_valid(variant: str) -> None:
    sizes = {
        "num_layers": 1,
        "hidden_size": 8,
        "ffn_hidden_size": 8,
        "num_attention_heads": 1,
        "vocab_size": 64,
    }
    sizes["max_position_embeddings"] = 128
    overrides = ["model.hf=null", *(f"+model.{key}={size}" for key, size in sizes.items())]
    recipe = load_recipe(ROOT / "examples" / "chats" / "recipe.yaml", [*overrides, f"pear.variant={variant}"])
    assert recipe.pear.variant == variant
