"""A rank of ``megatron sft`` on CPU: the edge replaced, then the program.

python -m tests.adapters.swift_cpu [options]
"""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    from tests.adapters import swift_edge

    swift_edge.install()
    runpy.run_module("pear_megatron.adapters.swift", run_name="__main__", alter_sys=True)
