"""On a terminal: Ctrl-C ends with one line and no traceback, and the user's error is the last thing on the screen."""

from __future__ import annotations

import os
import pty
import re
import select
import sys
import time
from pathlib import Path

import pytest

from tests.megatron.ranks import SMALL
from tests.megatron.runs import REPOSITORY, TINY, metrics, write_trajectories

CTRL_C = b"\x03"


class Terminal:
    """A Python command on a terminal of its own."""

    def __init__(self, *arguments: str | Path) -> None:
        self.screen = b""
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.environ |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
            os.environ.pop("WORLD_SIZE", None)
            os.chdir(REPOSITORY)
            os.execv(sys.executable, [sys.executable, *map(str, arguments)])

    def press(self, keys: bytes) -> None:
        os.write(self._terminal, keys)

    def read_until(self, text: str | None, seconds: float = 600) -> None:
        """Reads until the text is on the screen; None = until the command has ended."""
        deadline = time.monotonic() + seconds
        while text is None or text.encode() not in self.screen:
            assert time.monotonic() < deadline, self.screen.decode(errors="replace")[-3000:]
            if select.select([self._terminal], [], [], 1.0)[0]:
                try:
                    self.screen += os.read(self._terminal, 65536)
                except OSError:  # how a terminal says that nobody is there any more
                    assert text is None, self.screen.decode(errors="replace")[-3000:]
                    return

    def end(self) -> tuple[int, str]:
        """Exit code, and what is on the screen."""
        self.read_until(None)
        _, status = os.waitpid(self._pid, 0)
        text = re.sub(
            r"\x1b\[[0-9;?]*[A-Za-z]", "", self.screen.decode(errors="replace")
        )  # colours, the cursor
        return os.waitstatus_to_exitcode(status), text.replace("\r\n", "\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trajectories(tmp_path_factory.mktemp("data") / "data.jsonl")


def training(data: Path, output: Path, ranks: int, *more: str) -> list[str]:
    arguments = ["-m", "pear_megatron.train", "--nproc-per-node", str(ranks), "--config", str(TINY)]
    return [*arguments, f"data.train={data}", f"output_dir={output}", *SMALL, "train.max_steps=5000", *more]


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_saves_and_ends_with_the_code_for_going_on(data: Path, tmp_path: Path, ranks: int) -> None:
    terminal = Terminal(*training(data, tmp_path, ranks))
    terminal.read_until("tokens/s")
    terminal.press(CTRL_C)
    code, screen = terminal.end()
    step = metrics(tmp_path)[-1]["step"]
    assert code == 75
    assert "Traceback" not in screen
    last = screen.strip().splitlines()[-1]
    assert last.startswith(f"stopped at step {step} of 5000, and saved; the same command goes on: ")
    assert (tmp_path / "checkpoints" / f"iter_{step:07d}" / "files.json").exists()


def test_a_second_ctrl_c_ends_at_once(data: Path, tmp_path: Path) -> None:
    a_long_step = "train.global_batch_size=1024"
    terminal = Terminal(*training(data, tmp_path, 1, a_long_step))
    terminal.read_until("tokens/s")
    terminal.press(CTRL_C)
    terminal.read_until("Ctrl-C again ends it at once")
    time.sleep(1.0)  # sooner, it would be taken for the first one, passed on by torchrun
    terminal.press(CTRL_C)
    code, screen = terminal.end()
    assert code == 130
    assert "Traceback" not in screen
    assert screen.strip().splitlines()[-1].startswith("ended at once; whole checkpoints in ")
    assert not list((tmp_path / "checkpoints").glob("iter_*"))


def test_ctrl_c_before_training_says_that_nothing_was_trained(data: Path, tmp_path: Path) -> None:
    terminal = Terminal(*training(data, tmp_path, 2))
    terminal.read_until("reading trajectories")
    terminal.press(CTRL_C)
    code, screen = terminal.end()
    assert code in (75, 130)  # 75: the reading was over before the key came
    assert "Traceback" not in screen
    assert "the same command" in screen.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "pear_megatron.train", "--nproc-per-node", "2", "--config", str(TINY), "data.train=/nowhere.jsonl"],
        ["-m", "pear_megatron.cli", "convert", "--hf", "HF", "--output", "OUTPUT", "--tensor-parallel", "2"],
    ],
    ids=["train", "convert"],
)  # fmt: skip
def test_an_error_on_ranks_is_the_last_thing_on_the_screen(tmp_path: Path, arguments: list[str]) -> None:
    from tests.hf.models import save_model

    if "HF" in arguments:  # its weights are found to be damaged by the ranks, not before
        save_model("qwen2", tmp_path / "hf")
        (tmp_path / "hf" / "model.safetensors").write_bytes(b"damaged")
    names = {"HF": str(tmp_path / "hf"), "OUTPUT": str(tmp_path / "output")}
    code, screen = Terminal(*(names.get(word, word) for word in arguments)).end()
    assert code == 1
    assert "Traceback" not in screen
    assert any(line.startswith("error: ") for line in screen.strip().splitlines()[-3:])
    assert ".py" not in screen


@pytest.mark.slow
def test_under_a_users_own_torchrun_its_report_says_the_error_and_no_traceback_of_ours(
    tmp_path: Path,
) -> None:
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "pear_megatron.train",
    ]
    code, screen = Terminal(*torchrun, "--config", TINY, "pear.gama=1").end()
    assert code == 1
    assert "unknown key 'gama'; did you mean 'gamma'?" in "\n".join(screen.strip().splitlines()[-3:])
