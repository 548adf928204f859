"""What is released: versions in one voice, a source distribution that is whole, a wheel that stands by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement

import pear_megatron
from pear_megatron import _C

ROOT = Path(__file__).parents[1]
SITE = sysconfig.get_path("purelib")


def python(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def test_the_version_is_the_same_everywhere() -> None:
    version = pear_megatron.__version__
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## {version} (" in (ROOT / "CHANGELOG.md").read_text()


def test_issue_forms_and_the_development_container_are_well_formed() -> None:
    for form in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[bi]*.yml")):
        read = yaml.safe_load(form.read_text())
        assert read["name"]
        assert all(set(field) <= {"type", "id", "attributes", "validations"} for field in read["body"])
    dockerfile = yaml.safe_load((ROOT / ".devcontainer" / "devcontainer.json").read_text())["build"][
        "dockerfile"
    ]
    assert (ROOT / ".devcontainer" / dockerfile).is_file()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked; made without torch."""
    folder = tmp_path_factory.mktemp("sdist")
    script = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; runpy.run_path('setup.py')"
    )
    done = python(
        *("-c", script, "setup.py", "egg_info", f"--egg-base={folder}", "sdist", f"--dist-dir={folder}"),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    return folder / "unpacked" / f"pear_megatron-{pear_megatron.__version__}"


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """A wheel from the source distribution, with the extension that is compiled already."""
    done = python("setup.py", "build_py", cwd=sdist)
    assert done.returncode == 0, done.stderr
    (library,) = (sdist / "build").glob("lib*")
    shutil.copy(_C.__file__, library / "pear_megatron")
    done = python("setup.py", "bdist_wheel", "--skip-build", cwd=sdist)
    assert done.returncode == 0, done.stderr
    (built,) = (sdist / "dist").glob("*.whl")
    return built


@pytest.mark.slow
def test_the_source_distribution_has_all_that_a_build_reads(sdist: Path) -> None:
    for folder in ("csrc", "recipes", "slurm", "pear_megatron"):
        wanted = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.is_file()}
        wanted = {p for p in wanted if p.suffix not in (".so", ".pyc")}
        assert {p for p in wanted if not (sdist / p).is_file()} == set()
    assert not list(sdist.rglob("*.so"))
    requirements = Parser().parsestr((sdist / "PKG-INFO").read_text()).get_all("Requires-Dist")
    assert "torch>=2.6" in requirements


@pytest.mark.slow
def test_the_wheel_is_for_its_torch_and_has_every_file_and_none_too_many(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        wanted = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist")
        executable = archive.getinfo("pear_megatron/_slurm/node.sh").external_attr >> 16 & 0o100
    (needs,) = (Requirement(text) for text in wanted if text.startswith("torch=="))
    assert needs.specifier.contains(torch.__version__, prereleases=True)
    assert not needs.specifier.contains("1.2.3")
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"pear_megatron"}
    ours = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "pear_megatron").rglob("*.*")
        if p.suffix not in (".so", ".pyc")
    }
    assert ours <= set(names)
    assert executable
    assert "none-any" not in wheel.name


@pytest.mark.slow
def test_recipes_and_scripts_are_used_from_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)

    def command(*arguments: str) -> str:
        done = python("-m", "pear_megatron.cli", *arguments, cwd=tmp_path, PYTHONPATH=str(installed))
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = {line.split()[0] for line in command("recipes", "list").splitlines()}
    assert listed == {p.relative_to(ROOT / "recipes").as_posix() for p in (ROOT / "recipes").rglob("*.yaml")}
    shown = command("recipes", "show", "sft/qwen2.5-7b")
    assert shown == (ROOT / "recipes" / "sft" / "qwen2.5-7b.yaml").read_text()
    assert command("recipes", "copy", "sft/qwen2.5-7b", "mine.yaml") == "mine.yaml\n"
    assert "Layout" in command("plan", "--config", "mine.yaml")
    assert "slurm/sft.sbatch" in command("slurm", "copy")
    assert (
        f"in {installed}"
        in python("-m", "pear_megatron.cli", "doctor", cwd=tmp_path, PYTHONPATH=str(installed)).stdout
    )


@pytest.mark.slow
def test_a_build_without_torch_or_with_another_one_ends_in_a_sentence(sdist: Path, tmp_path: Path) -> None:
    venv.create(tmp_path, symlinks=True)
    bare = tmp_path / "bin" / "python"

    def build(path: str, command: str = "dist_info") -> str:
        """The one line that pip has to show: metadata are the first that it asks for."""
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(
            [bare, "setup.py", command], cwd=sdist, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 1
        lines = done.stderr.splitlines()
        assert command != "dist_info" or len(lines) == 1
        return lines[-1]

    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("setuptools", "_distutils_hack", "wheel"):
        (tools / name).symlink_to(Path(SITE) / name)
    assert "install torch first" in build(str(tools))
    assert "install torch first" in build(str(tools), "build_ext")
    (site,) = tmp_path.glob("lib/python*/site-packages")
    (site / "torch").mkdir()
    (site / "torch" / "version.py").write_text("__version__ = '1.2.3'\n")
    said = build(SITE)  # as pip's isolated build: another torch comes before the environment's
    assert f"against torch {torch.__version__}, and this environment has torch 1.2.3" in said
