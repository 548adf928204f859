"""Rehearses many starts with NeMo-RL imported once: each line of stdin, a JSON list of arguments, in a fork of its own.

python rehearsals.py REHEARSAL_FOLDER     (in a checkout, in NeMo-RL's environment)
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    program = runpy.run_path(os.path.join(folder, "__main__.py"))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    program["prepare"]()
    importlib.import_module("nemo_rl.algorithms.grpo")
    stand_ins = importlib.import_module("stand_ins")
    for name in ("data", "setup"):
        stand_ins.import_of_workers(f"nemo_rl.models.megatron.{name}")
    for line in sys.stdin:
        arguments = json.loads(line)
        if not (child := os.fork()):
            code = 1
            try:
                program["main"](*arguments)
                code = 0
            finally:
                os._exit(code)
        answers.write(f"{os.waitpid(child, 0)[1]}\n")


if __name__ == "__main__":
    main(sys.argv[1])
