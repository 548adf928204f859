"""Recipes and scripts that come with the package: found by name, inherited from, copied."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pear_megatron.compare.recipe import load_compare_recipe
from pear_megatron.recipe import RecipeError, load_recipe
from pear_megatron.recipe.shipped import (
    copy_recipe,
    copy_slurm,
    find_script,
    find_shipped,
    shipped_recipes,
    slurm_scripts,
)
from pear_megatron.rl.nemo_rl.config import compose
from pear_megatron.rl.trl.recipe import load_trl_recipe

ROOT = Path(__file__).parents[2]


def test_every_recipe_and_script_of_the_repository_is_listed() -> None:
    assert set(shipped_recipes().values()) == set((ROOT / "recipes").rglob("*.yaml"))
    assert {"sft.sbatch", "common.sh", "cluster.env"} <= set(slurm_scripts())


def test_a_bare_name_is_looked_for_in_the_folder_of_its_kind() -> None:
    assert find_shipped("pear:base.yaml", "sft") == ROOT / "recipes" / "sft" / "base.yaml"
    assert find_shipped("pear:base.yaml", "grpo_trl") == ROOT / "recipes" / "grpo_trl" / "base.yaml"
    assert find_shipped("tiny") == ROOT / "recipes" / "sft" / "tiny.yaml"
    assert find_shipped("grpo/base", "sft") == ROOT / "recipes" / "grpo" / "base.yaml"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base", "grpo/base.yaml or grpo_trl/base.yaml or sft/base.yaml; write which"),
        ("tiney", "did you mean sft/tiny.yaml"),
        ("sft/tiney.yaml", "did you mean sft/tiny.yaml"),
        ("xyzzy", "`pear-megatron recipes list` shows them"),
        ("../slurm/cluster.env", "no recipe '../slurm/cluster.env'"),
        ("sft/../sft/tiny", "did you mean sft/tiny.yaml"),
    ],
)
def test_a_name_that_is_none_gets_the_closest(name: str, said: str) -> None:
    with pytest.raises(RecipeError) as raised:
        find_shipped(name)
    assert said in str(raised.value)


def test_a_recipe_inherits_from_the_package_and_is_named_by_it(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults: pear:tiny.yaml\ntrain: {max_steps: 5}\n")
    inherited = load_recipe(mine, ["data.train=x"])
    named = load_recipe("pear:tiny.yaml", ["data.train=x", "train.max_steps=5"])
    assert inherited == named
    assert named.model.num_layers > 0


def test_an_unknown_parent_names_the_file_and_the_closest(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults: pear:bse.yaml\n")
    with pytest.raises(RecipeError, match=rf"{mine}: defaults: no recipe 'bse.yaml'.*sft/base.yaml"):
        load_recipe(mine, ["data.train=x"])


def test_a_path_of_the_docs_that_is_not_here_leads_to_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="did you mean pear:sft/qwen3-8b.yaml"):
        load_recipe("recipes/sft/qwen3-8b.yaml")


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_copy_is_the_same_recipe_somewhere_else(name: str, tmp_path: Path) -> None:
    kind = name.partition("/")[0]
    written = copy_recipe(name, tmp_path / "mine")
    assert written[0] == tmp_path / "mine" / Path(name).name
    if kind == "sft" and name != "sft/base.yaml":
        assert load_recipe(written[0], ["data.train=x"]) == load_recipe(f"pear:{name}", ["data.train=x"])
    elif kind == "grpo_trl" and name != "grpo_trl/base.yaml":
        assert load_trl_recipe(written[0]) == load_trl_recipe(f"pear:{name}")
    elif kind == "compare" and not name.endswith("_base.yaml"):
        assert load_compare_recipe(written[0]) == load_compare_recipe(f"pear:{name}")
    elif kind == "grpo":  # whole, since NeMo-RL reads it: to its own files, no step leads into the package
        parents = {line for path in written for line in path.read_text().splitlines() if "defaults:" in line}
        assert all(
            "NEMO_RL_DIR" in parent or (tmp_path / "mine" / parent.split()[1]).exists() for parent in parents
        )


def test_a_copy_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("mine")
    with pytest.raises(RecipeError, match="base.yaml exists already"):
        copy_recipe("grpo/qwen3-8b", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["base.yaml"]
    with pytest.raises(RecipeError, match="parent of grpo/qwen3-8b"):
        copy_recipe("grpo/qwen3-8b", tmp_path / "new" / "base.yaml")
    with pytest.raises(RecipeError, match="exists already"):
        copy_slurm(tmp_path)


def test_what_nemo_rl_reads_itself_is_copied_and_not_named(tmp_path: Path) -> None:
    loader = tmp_path / "RL" / "nemo_rl" / "utils" / "config.py"
    loader.parent.mkdir(parents=True)
    loader.write_text("def register_omegaconf_resolvers(): pass\n")
    mine = tmp_path / "recipes" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text("defaults: pear:qwen3-8b.yaml\n")
    with pytest.raises(RecipeError, match=rf"recipes copy grpo/qwen3-8b.yaml {mine.parent}`"):
        compose(tmp_path / "RL", mine, [])


def test_copied_scripts_name_this_python_and_can_be_run(tmp_path: Path) -> None:
    copied = copy_slurm(tmp_path / "slurm")
    assert {path.name for path in copied} == set(slurm_scripts())
    command = f". {tmp_path}/slurm/cluster.env && $PEAR_PYTHON -c 'import sys; print(sys.prefix)'"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    )
    assert done.stdout.strip() == sys.prefix
    assert os.access(tmp_path / "slurm" / "node.sh", os.X_OK)


def test_an_unknown_script_gets_the_closest() -> None:
    with pytest.raises(RecipeError, match=r"did you mean sft\.sbatch\?"):
        find_script("sft.sbtach")
