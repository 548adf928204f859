"""NeMo-RL for these tests: a stand-in of ours, and the checkout that NEMO_RL_DIR names, where it does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pear_megatron.rl.nemo_rl import preflight
from tests.rl.nemo_rl.stand_in import write_stand_in

CHECKOUT = os.environ.get("NEMO_RL_DIR")


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stand_in(tmp_path_factory.mktemp("nemo-rl"))


@pytest.fixture(params=["stand-in", "checkout"])
def nemo_rl(
    request: pytest.FixtureRequest, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A checkout, named by NEMO_RL_DIR; the test runs in an empty folder, outside any Slurm job."""
    if request.param == "checkout" and not CHECKOUT:
        pytest.skip("NEMO_RL_DIR names no checkout of NeMo-RL")
    root = stand_in if request.param == "stand-in" else Path(CHECKOUT or "")
    monkeypatch.setenv("NEMO_RL_DIR", str(root))
    for name in [*os.environ]:
        if name.startswith("SLURM_") or name in (
            "HF_HOME",
            "NRL_MEGATRON_CHECKPOINT_DIR",
            "DEDICATED_RAY_HEAD",
        ):
            monkeypatch.delenv(name)
    monkeypatch.setattr(
        preflight, "_interpreters", list
    )  # NeMo-RL itself is asked in test_preflight.py alone
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return root.resolve()
