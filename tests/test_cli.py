"""The pear-megatron command, as a user types it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.megatron.runs import write_trajectories


def pear_megatron(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pear_megatron.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_validate_says_what_is_in_the_data(tmp_path: Path) -> None:
    done = pear_megatron("validate", str(write_trajectories(tmp_path / "data.jsonl", count=7)))
    assert done.returncode == 0, done.stderr
    assert "trajectories" in done.stdout
    assert " 7 " in done.stdout


def test_validate_fails_with_file_line_and_field(tmp_path: Path) -> None:
    data = write_trajectories(tmp_path / "data.jsonl", count=3)
    data.write_text(data.read_text().replace('"loss_mask"', '"loss_maks"', 1))
    done = pear_megatron("validate", str(data))
    assert done.returncode == 1
    assert f"{data}:1" in done.stderr
    assert "loss_mask" in done.stderr


def test_help_shows_an_example() -> None:
    assert "Example: pear-megatron validate" in pear_megatron("validate", "--help").stdout


def modules_after(code: str) -> set[str]:
    """What a fresh interpreter has imported once it has run ``code``, in which the command may exit."""
    show = "import atexit, sys; atexit.register(lambda: print('MODULES', *sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"{show}\n{code}"], capture_output=True, text=True, timeout=600
    )
    return set(done.stdout.rpartition("MODULES")[2].split())


COMMANDS = (
    "validate", "score", "inspect", "plan", "convert", "export", "grpo", "eval", "eval-compare", "compare", "doctor"
)  # fmt: skip


def test_every_command_is_listed() -> None:
    from pear_megatron.cli import app

    assert {command.name for command in app.registered_commands} == set(COMMANDS)
    assert {group.name for group in app.registered_groups} == {"recipes", "slurm"}


HELP = """
import sys
from pear_megatron.cli import app
for command in [], *([name] for name in sys.argv[1:]):
    sys.argv = ["pear-megatron", *command, "--help"]
    try:
        app()
    except SystemExit as ended:
        assert not ended.code, command
    assert "typer" in sys.modules
    assert not {"torch", "megatron", "transformers", "matplotlib"} & set(sys.modules), command
"""


def test_help_imports_neither_torch_nor_megatron() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP, *COMMANDS, "recipes", "slurm"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: pear-megatron") == len(COMMANDS) + 3


@pytest.mark.parametrize("command", ["train", "plan", "compare"])
def test_a_misspelt_key_is_named_before_torch_is_imported(command: str, tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("output_dir: x\nseedz: 1\n")
    run = {
        "train": "from pear_megatron.train.__main__ import main\nmain(['--config', sys.argv[-1]])",
        "plan": "from pear_megatron.cli import app\napp()",
        "compare": "from pear_megatron.cli import app\napp()",
    }[command]
    modules = modules_after(f"sys.argv = ['pear-megatron', {command!r}, '--config', {str(recipe)!r}]\n{run}")
    assert "pear_megatron.recipe.load" in modules
    assert not {"torch", "megatron", "transformers", "matplotlib"} & modules


def test_a_plan_needs_no_torch() -> None:
    """It is made on a login node, and in every job before the training starts."""
    plan = "sys.argv = ['pear-megatron', 'plan', '--config', 'pear:tiny.yaml']"
    modules = modules_after(f"{plan}\nfrom pear_megatron.cli import app\napp()")
    assert "pear_megatron.plan.estimate" in modules
    assert not {"torch", "megatron", "transformers", "matplotlib"} & modules


def test_the_public_names_are_there_without_being_imported_first() -> None:
    import pear_megatron

    for name in pear_megatron.__all__:
        assert name in dir(pear_megatron)
        value = getattr(pear_megatron, name)
        assert pickle.loads(pickle.dumps(value)) is value
    with pytest.raises(AttributeError, match="no attribute 'pear_los'"):
        _ = pear_megatron.pear_los  # type: ignore[attr-defined]
    import pear_megatron.ops

    assert pear_megatron.ops.linear_logprob is pear_megatron.linear_logprob


def test_version_says_which_ops_are_compiled() -> None:
    from pear_megatron import __version__
    from pear_megatron.ops.library import with_cuda

    done = pear_megatron("--version")
    assert done.returncode == 0
    assert done.stdout == f"pear-megatron {__version__}, {'with CUDA ops' if with_cuda else 'CPU ops only'}\n"
