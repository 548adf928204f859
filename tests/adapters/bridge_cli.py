"""`pear-megatron` on CPU with Megatron-Bridge's own files: commands in a row, the edge replaced (test_bridge_cli.py).

python -m tests.adapters.bridge_cli results.json '["convert", "--hf", ...]' '["export", ...]'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.adapters import bridge_edge, swift_edge


def run(arguments: list[str]) -> dict[str, Any]:
    """A command's exit code and what it said."""
    from typer.testing import CliRunner

    from pear_megatron.cli import app

    for name in [name for name in os.environ if name.startswith("NVTE_")]:
        del os.environ[name]  # what Megatron left of the last model's attention
    result = CliRunner().invoke(app, arguments)
    crash = "" if isinstance(result.exception, SystemExit | None) else repr(result.exception)
    return {"code": result.exit_code, "out": result.stdout, "err": result.stderr + crash}


if __name__ == "__main__":
    bridge_edge.install(swift_edge.put_layers)
    output, *commands = sys.argv[1:]
    Path(output).write_text(json.dumps([run(json.loads(command)) for command in commands]))
