"""Worked examples, run from the repository root: ``python -m examples.NAME.SCRIPT --help``."""
