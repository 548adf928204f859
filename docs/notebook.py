"""Makes docs/quickstart.md and its picture from examples/quickstart.ipynb, whose outputs they show.

Example:
    python docs/notebook.py              after the notebook was changed
    python docs/notebook.py --execute    runs it first (a minute), and keeps its new outputs
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
NOTEBOOK = DOCS.parent / "examples" / "quickstart.ipynb"
PICTURE = DOCS / "images" / "quickstart.png"
_HEAD = (
    "<!-- Made by docs/notebook.py from examples/quickstart.ipynb. -->\n\n"
    "*This page is the notebook `examples/quickstart.ipynb` with its outputs; CI executes it.*\n"
)


def execute(path: Path, **environment: str) -> dict[str, Any]:
    """The notebook as it is after a run, in a kernel of this Python.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, kernel_name="python3", timeout=1200, resources=resources)
    client.execute(env=os.environ | environment)
    for cell in notebook.cells:
        cell.metadata.clear()  # times of execution
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """Without progress bars and warnings, and what was printed in one piece, without colours."""
    kept: list[Any] = []
    for output in outputs:
        if output.output_type != "stream":
            kept.append(output)
        elif output.name == "stdout":
            if not kept or kept[-1].output_type != "stream":
                kept.append(output)
            else:
                kept[-1].text += output.text
    for output in kept:
        if output.output_type == "stream":
            plain = re.sub(r"\x1b\[[\d;]*m|\r(?=\n)", "", output.text)  # colours; a terminal's line ends
            output.text = re.sub(r" +$", "", plain, flags=re.MULTILINE)
    return kept


def page(notebook: dict[str, Any]) -> tuple[str, bytes]:
    """The page in Markdown, and the notebook's one picture."""
    parts, pictures = [], []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\(\.\./docs/", "](", source))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                pictures.append(base64.b64decode("".join(data["image/png"])))
                parts.append(f"![The notebook's picture](images/{PICTURE.name})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))).strip("\n"):
                parts.append(f"```text\n{text}\n```")
    title, *rest = parts
    (picture,) = pictures
    head, _, body = title.partition("\n")
    return "\n\n".join([head, _HEAD.rstrip(), body.strip(), *rest]) + "\n", picture


def main() -> None:
    """The command line."""
    if "--execute" in sys.argv[1:]:
        import nbformat

        nbformat.write(execute(NOTEBOOK), NOTEBOOK)
    text, picture = page(json.loads(NOTEBOOK.read_text()))
    (DOCS / "quickstart.md").write_text(text)
    PICTURE.write_bytes(picture)


if __name__ == "__main__":
    main()
