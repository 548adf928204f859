"""On a full disk every command ends with one sentence that names the place, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("scipy", reason="needs the extra eval")

from pear_megatron.cli import app
from pear_megatron.errors import of_the_system
from tests.evaluate.words import save_word_model, write_problems
from tests.full_disk import files_up_to
from tests.inspect.scored_rows import scored
from tests.megatron.runs import Started, run_entry_point, write_trajectories
from tests.structured import write_rows


@pytest.fixture(scope="module")
def word_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_word_model(tmp_path_factory.mktemp("model"))


def run(*arguments: str | Path, size: int | None = None) -> tuple[int, str]:
    """Exit code and standard error of a command, whose files may grow to ``size``."""
    words = [str(word) for word in arguments]
    if size is None:
        done = CliRunner().invoke(app, words)
    else:
        with files_up_to(size):
            done = CliRunner().invoke(app, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stderr


def refused(said: tuple[int, str], output: Path) -> None:
    code, text = said
    assert code == 1, text
    assert "Traceback" not in text
    said = text[text.index("error: ") :].strip()
    assert len(said.splitlines()) <= 2
    assert str(output) in said
    assert any(reason in said for reason in ("File too large", "No space left", "cannot be written"))
    assert not [path for path in output.parent.rglob("*") if "partial" in path.name]


@pytest.mark.parametrize("size", [300, 1500, 5000])
def test_eval(word_model: Path, tmp_path: Path, size: int) -> None:
    problems = write_problems(tmp_path)
    options = ["--num-samples", "4", "--max-new-tokens", "6", "--output", tmp_path / "out"]
    command = ["eval", "--model", word_model, "--problems", problems, "--grader", problems.with_suffix(".py")]
    refused(run(*command, *options, size=size), tmp_path / "out")
    assert run(*command, *options)[0] == 0


def test_inspect(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", scored())
    output = tmp_path / "page.html"
    refused(run("inspect", data, "--scored", "--output", output, size=5000), output)
    assert not output.exists()


@pytest.mark.parametrize("size", [400, 2500])
def test_score(word_model: Path, tmp_path: Path, size: int) -> None:
    rows = [{"input_ids": [0, 1, 2, i % 3], "loss_mask": [0, 1, 1, 1]} for i in range(9)]
    data, output = write_rows(tmp_path / "data.jsonl", rows), tmp_path / "out.parquet"
    command = ["score", "--model", word_model, "--backend", "hf", "--data", data, "--output", output]
    refused(run(*command, size=size), output)
    assert not output.exists()
    assert run(*command)[0] == 0


def _on_a_full_disk(rank: int, world: int, port: int, output: object, arguments: list[str]) -> None:
    with files_up_to(1000):
        run_entry_point(rank, world, port, output, arguments)  # type: ignore[arg-type]


def test_training(tmp_path: Path) -> None:
    data = write_trajectories(tmp_path / "data.jsonl")
    started = Started(2, f"data.train={data}", f"output_dir={tmp_path / 'out'}", target=_on_a_full_disk)
    assert started.wait() == [1, 1]
    said = started.output(0)
    assert "Traceback" not in started.output(1)
    refused((1, said), tmp_path / "out")
    assert not list((tmp_path / "out" / "data_cache").iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_what_libraries_say_of_a_disk_that_is_really_full(small_disk: Path) -> None:
    tensor = {"x": torch.zeros(10**5)}
    for number, save in enumerate((torch.save, safetensors.torch.save_file)):
        with pytest.raises(Exception, match=r".") as raised:
            save(tensor, small_disk / f"{number}")
        told = str(of_the_system(raised.value, small_disk))
        assert told.startswith(f"{small_disk}: ")
        assert told.endswith("; name another place, or make room there")
    assert of_the_system(ValueError("x"), small_disk) is None


def _fill(folder: Path) -> None:
    with (folder / "fill").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_stage_of_a_comparison(small_disk: Path) -> None:
    from pear_megatron.compare.workers import StageError, run_stage

    with pytest.raises(StageError, match=rf"stage failed .*\n.*\(the disk of {small_disk} is full\)"):
        run_stage(
            _fill,
            small_disk,
            log=small_disk / "stage.log",
            threads=1,
            ranks=None,
            running=set(),
            stopped=threading.Event(),
        )


def test_grpo(word_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs the extra rl")
    from tests.rl.trl.test_grpo import write_recipe

    output = tmp_path / "out"
    command = ["grpo", "--engine", "trl", "--config", write_recipe(tmp_path), "--checkpoint", word_model]
    refused(run(*command, "--output", output, size=15_000), output)
    assert not list((output / "checkpoints").glob("checkpoint-*"))
    assert run(*command, "--output", output)[0] == 0
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
