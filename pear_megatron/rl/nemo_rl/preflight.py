"""NeMo-RL's own word on a recipe, before anything is queued: a rehearsal of its start in its own environment."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pear_megatron.rl.nemo_rl.config import Composed

_PROGRAM = Path(__file__).with_name("rehearsal")
_SECONDS = 900


@dataclass(frozen=True)
class Verdict:
    """What NeMo-RL said.

    Attributes:
        faults: what it stops at, a line each, with keys and its own file and line.
        unchecked: why it did not check the recipe, or a part of it; empty = it checked all.
        looked: False = it did not look at the recipe at all.
    """

    faults: list[str]
    unchecked: str = ""
    looked: bool = True


def nemo_rl_python() -> list[str]:
    """How NeMo-RL's own scripts are started: by this interpreter in NeMo-RL's environment, else by uv."""
    own = importlib.util.find_spec("nemo_rl") and importlib.util.find_spec("ray")
    return [sys.executable] if own else ["uv", "run"]


def ask_nemo_rl(
    root: Path, arguments: list[str], environment: Mapping[str, str], recipe: Composed
) -> Verdict:
    """Rehearses a start; takes about half a minute, most of it for importing NeMo-RL.

    Args:
        root: the checkout.
        arguments: NeMo-RL's script and its command line.
        environment: variables beside this process's.
        recipe: composed; its values are quoted.
    """
    reasons = []
    for python in _interpreters():
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            command = [*python, str(_PROGRAM), str(report), *arguments]
            try:
                done = subprocess.run(
                    command,
                    cwd=root,
                    env={**os.environ, **environment},
                    capture_output=True,
                    text=True,
                    timeout=_SECONDS,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                reasons.append(str(error))
                continue
            if not report.is_file():
                last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
                reasons.append(f"{' '.join(python)}: {last}")
                continue
            said = json.loads(report.read_text(encoding="utf-8"))
        if said["imported"]:
            faults = [_line(fault["says"], fault["at"], fault["keys"], recipe) for fault in said["faults"]]
            return Verdict(faults, "; ".join(said["unchecked"]))
        reasons += [f"{' '.join(python)}: {reason}" for reason in said["unchecked"]]
    return Verdict([], "; ".join(reasons) or "this is not its environment, and there is no uv", looked=False)


def _interpreters() -> list[list[str]]:
    found = [[sys.executable]] if importlib.util.find_spec("ray") else []
    return [*found, *([["uv", "run", "--no-sync"]] if shutil.which("uv") else [])]  # installs nothing


def _line(says: str, at: str, keys: list[str], recipe: Composed) -> str:
    values = ", ".join(f"{key}={recipe.get(key)}" for key in keys)
    return f"{values}: {says} (NeMo-RL, {at})" if keys else f"{says} (NeMo-RL, {at})"
