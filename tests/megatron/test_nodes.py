"""Several nodes, each a rank here: what one has otherwise than the first is an error on both, and so is its end."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file

from pear_megatron.megatron.checkpoint.model_folder import ModelFacts
from tests.hf.models import save_model
from tests.megatron.runs import REPOSITORY, TINY, Started, run_entry_point
from tests.megatron.test_resume import wait_until

SHORT = ["pear.variant=none", "train.max_steps=2"]


def node(
    overrides: Callable[[int], list[str]] | None,
    folder: Path | None,
    rank: int,
    world: int,
    port: int,
    output: Connection,
    arguments: list[str],
) -> None:
    """What the only rank of a node does, with overrides and a working directory of its own."""
    from pear_megatron import ranks

    ranks._SECONDS_OF_A_SLOW_FOLDER = 0.5
    if folder is not None:
        os.chdir(folder / str(rank))
    more = [] if overrides is None else overrides(rank)
    run_entry_point(rank, world, port, output, [*arguments, *more], local_rank=0)


def rank_of_two(
    folder: Path, rank: int, world: int, port: int, output: Connection, arguments: list[str]
) -> None:
    """One of two ranks of a node, which says when it takes the digest of the node's weights."""
    from pear_megatron.train import start

    read = start.read_model_facts

    def reads(folder: Path) -> ModelFacts:
        print("reads the weights", flush=True)
        return read(folder)

    start.read_model_facts = reads
    arguments = [*arguments, *weights_of_its_own(folder, rank // 2)]
    run_entry_point(rank, world, port, output, arguments, local_rank=rank % 2)


def outputs(*arguments: str, config: Path = TINY, **of_node: Callable[[int], list[str]] | Path) -> list[str]:
    """What each of two nodes says of a run that fails on both."""
    target = partial(node, of_node.get("overrides"), of_node.get("folder"))
    run = Started(2, *SHORT, *arguments, config=config, target=target)  # type: ignore[arg-type]
    assert run.wait() == [1, 1]
    said = [run.output(rank) for rank in range(2)]
    assert "Traceback" not in "".join(said)
    return said


def another_rate(rank: int) -> list[str]:
    return ["optimizer.lr=0.5"] if rank else []


def a_wrong_key(rank: int) -> list[str]:
    return ["optimizer.ler=0.5"] if rank else []


def weights_of_its_own(folder: Path, rank: int) -> list[str]:
    return [f"model.hf={folder / str(rank)}"]


def test_another_recipe_on_one_node_is_an_error_on_both(tmp_path: Path, trajectories: Path) -> None:
    run = tmp_path / "run"
    for said in outputs(f"data.train={trajectories}", f"output_dir={run}", overrides=another_rate):
        assert "error: rank 1 on " in said
        assert "differs from rank 0: optimizer.lr 0.001 -> 0.5; give every node the same command" in said
    assert not run.exists()


def test_other_weights_on_one_node_are_an_error_on_both_and_a_copy_is_none(
    tmp_path: Path, trajectories: Path
) -> None:
    for number in range(2):
        save_model("qwen2", tmp_path / str(number), vocab_size=1000)
    recipe = {
        "defaults": str(REPOSITORY / "recipes" / "sft" / "base.yaml"),
        "model": {},
        "train": {"precision": "fp32", "global_batch_size": 8},
        "data": {"train": str(trajectories), "seq_length": 64},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    adapters = Started(
        4, *SHORT, "+lora.rank=2", config=tmp_path / "recipe.yaml", target=partial(rank_of_two, tmp_path)
    )
    assert adapters.wait() == [0] * 4
    read = [adapters.output(rank).count("reads the weights") for rank in range(4)]
    assert read == [1, 0, 1, 0]  # once per node, also where lora.yaml names them
    shutil.rmtree(tmp_path / "run")

    file = tmp_path / "1" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    overrides = partial(weights_of_its_own, tmp_path)
    for said in outputs(config=tmp_path / "recipe.yaml", overrides=overrides):
        assert "differs from rank 0: weights in model.hf" in said


def test_an_error_of_one_node_alone_is_said_there(tmp_path: Path, trajectories: Path) -> None:
    """The others wait for it, until torchrun or Slurm ends them."""
    target = partial(node, a_wrong_key, None)
    run = Started(2, f"data.train={trajectories}", f"output_dir={tmp_path}", target=target)
    wait_until(lambda: "error: " in run.output(1), seconds=120)
    run.kill()
    run.wait()
    assert "unknown key 'ler'" in run.output(1)


def test_an_output_dir_that_the_other_node_does_not_see_is_an_error_on_both(
    tmp_path: Path, trajectories: Path
) -> None:
    """Checkpoints there would lack what the other node's ranks write."""
    (tmp_path / "0").mkdir()
    (tmp_path / "1" / "run").mkdir(parents=True)
    for said in outputs(f"data.train={trajectories}", "output_dir=run", folder=tmp_path):
        assert "does not see what rank 0 writes to output_dir run; choose a folder on a file system" in said
    assert not list((tmp_path / "1" / "run").iterdir())
    assert not list((tmp_path / "0" / "run").glob(".shared-*"))


def test_prepared_data_that_the_other_node_does_not_see_are_an_error_on_both(
    tmp_path: Path, trajectories: Path
) -> None:
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    places = [f"data.train={trajectories}", f"output_dir={tmp_path / 'run'}", "data.cache_dir=cache"]
    for said in outputs(*places, folder=tmp_path):
        assert "does not see what rank 0 writes to data.cache_dir cache; choose a folder" in said


def test_a_node_that_dies_is_said_by_the_others(tmp_path: Path, trajectories: Path) -> None:
    target = partial(node, None, None)
    run = Started(
        2,
        *("pear.variant=none", "train.max_steps=100000"),
        *(f"data.train={trajectories}", f"output_dir={tmp_path / 'run'}"),
        target=target,
    )
    wait_until(lambda: "step 2/" in run.output(), seconds=120)
    run.send(signal.SIGKILL, rank=1)
    assert run.wait() == [1, -signal.SIGKILL]
    assert "Traceback" not in run.output()
    assert "error: rank 0 on " in run.output()
    assert "has lost another rank, or its node" in run.output()
