"""examples/quickstart.ipynb runs as it stands, and the page of the docs shows it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.smollm2 import smollm2_folder

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def notebook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebook", DOCS / "notebook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_and_its_picture_are_those_of_the_notebook(notebook: ModuleType) -> None:
    """After a change: python docs/notebook.py."""
    text, picture = notebook.page(json.loads(notebook.NOTEBOOK.read_text()))
    assert (DOCS / "quickstart.md").read_text() == text
    assert notebook.PICTURE.read_bytes() == picture


def test_the_notebook_knows_no_machine_and_is_small(notebook: ModuleType) -> None:
    content = notebook.NOTEBOOK.read_text()
    assert not re.search(r"/(home|root|tmp|work|Users)/", content)
    assert len(content) < 150_000


@pytest.mark.slow
def test_the_notebook_runs_and_twenty_steps_teach_the_model(notebook: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("nbclient", reason="needs the extra dev")
    pytest.importorskip("ipykernel", reason="needs the extra dev")
    (tmp_path / "smollm2").symlink_to(smollm2_folder())
    done = notebook.execute(notebook.NOTEBOOK, QUICKSTART_DIR=str(tmp_path))
    outputs = [output for cell in done["cells"] for output in cell.get("outputs", [])]
    said = "".join(output.get("text", "") for output in outputs)
    assert "on-policy data" in said
    steps = [(float(nll), float(mean)) for nll, mean in re.findall(r"nll (\S+)  mean weight (\S+)", said)]
    assert len(steps) == 5
    assert steps[-1][0] < steps[0][0]  # fits
    assert steps[-1][1] > steps[0][1]  # and therefore weighs more
    assert "<svg" in (tmp_path / "inspect.html").read_text()
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
