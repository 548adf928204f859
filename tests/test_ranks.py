"""What a command has started ends with it, however that comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pear_megatron.errors import RecipeError
from pear_megatron.ranks import same_on_every_node
from tests.distributed import run_ranks
from tests.megatron.runs import REPOSITORY

_SLEEPER = """
import os, pathlib, sys, time
from pear_megatron.ranks import end_with_parent
end_with_parent()
pathlib.Path(sys.argv[1], str(os.getpid())).touch()
time.sleep(600)
"""


def _is_there(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _killed_with_its_parent(folder: Path, parent: str, count: int) -> bool:
    """Starts Python code, which leaves files with its children's ids in a folder, and kills it."""
    paths = f"{folder}:{REPOSITORY}"
    process = subprocess.Popen([sys.executable, "-c", parent], env={**os.environ, "PYTHONPATH": paths})
    begun = folder / "begun"
    deadline = time.monotonic() + 120
    while len(list(begun.iterdir())) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    children = [int(path.name) for path in begun.iterdir()]
    assert len(children) == count
    assert all(map(_is_there, children))
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(map(_is_there, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [child for child in children if _is_there(child)]
    for child in left:
        os.kill(child, signal.SIGKILL)
    return not left


def test_ranks_end_when_the_command_that_started_them_is_killed(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "sleeper.py").write_text(_SLEEPER)
    code = (
        f"from pear_megatron.ranks import run_ranks; run_ranks(2, 'sleeper', [{str(tmp_path / 'begun')!r}])"
    )
    assert _killed_with_its_parent(tmp_path, code, 2)


def test_commands_of_a_comparison_end_with_it(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    words = ["sh", "-c", f"touch {tmp_path / 'begun'}/$$; exec sleep 600"]
    code = f"import subprocess; from pear_megatron.ranks import mortal; subprocess.run(mortal({words!r}))"
    assert _killed_with_its_parent(tmp_path, code, 1)


_VICTIM = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(2)
sys.exit(1)
"""


def test_a_rank_that_was_killed_is_named_though_the_others_fail_for_it(tmp_path: Path) -> None:
    (tmp_path / "victim.py").write_text(_VICTIM)
    code = "import sys; from pear_megatron.ranks import run_ranks; sys.exit(run_ranks(2, 'victim', []))"
    paths = f"{tmp_path}:{REPOSITORY}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 128 + signal.SIGKILL
    assert "error: rank 1: Signal 9 (SIGKILL)" in done.stderr


def looks(rank: int, of_node: list[str]) -> tuple[str, bool]:
    """What a rank of nodes of two says, and whether it has looked itself."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}
    looked = []

    def look() -> str:
        looked.append(rank)
        if not of_node[rank // 2]:
            raise RecipeError(f"rank {rank} finds nothing")
        return of_node[rank // 2]

    try:
        return same_on_every_node("the weights", look), bool(looked)
    except RecipeError as error:
        return str(error), bool(looked)


def test_one_rank_of_each_node_looks_for_all() -> None:
    assert run_ranks(4, looks, ["a", "a"]) == [("a", True), ("a", False)] * 2


@pytest.mark.parametrize(
    ("second", "message"),
    [("b", 'differs from rank 0: the weights "a" -> "b"'), ("", "rank 2 finds nothing")],
)
def test_what_is_otherwise_on_one_node_is_an_error_on_every_rank(second: str, message: str) -> None:
    for said, _ in run_ranks(4, looks, ["a", second]):
        assert message in said
        assert "rank 2" in said
