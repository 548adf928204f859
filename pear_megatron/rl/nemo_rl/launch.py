"""From a recipe and a checkpoint to the command that starts NeMo-RL's GRPO, refused early where it would fail late."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from pear_megatron.errors import RecipeError
from pear_megatron.rl.nemo_rl.config import HOW_TO_GET, Composed, compose, find_checkout
from pear_megatron.rl.nemo_rl.preflight import ask_nemo_rl, nemo_rl_python
from pear_megatron.rl.nemo_rl.rules import Layout, data_sets, ignored_faults, layout, size_faults
from pear_megatron.rl.nemo_rl.starting_point import (
    StartingPoint,
    fit_faults,
    read_starting_point,
    stop_token_ids,
)

_CACHE = "NRL_MEGATRON_CHECKPOINT_DIR"
_OURS = ("policy.model_name", "checkpointing.pretrained_checkpoint")


@dataclass(frozen=True)
class Launch:
    """A checked start of NeMo-RL.

    Attributes:
        root: the checkout, in which the command runs.
        arguments: the script and what follows it.
        environment: variables that the command needs beside the caller's.
        notes: what the user should know, a line each.
    """

    root: Path
    arguments: list[str]
    environment: dict[str, str]
    recipe: Composed
    sizes: Layout
    notes: list[str]

    def shell(self) -> str:
        """One line for a shell, or for COMMAND of NeMo-RL's ray.sub."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        command = shlex.join(["env", *variables, *nemo_rl_python(), *self.arguments])
        return f"cd {shlex.quote(str(self.root))} && {command}"

    def run(self) -> NoReturn:
        """Replaces this process by NeMo-RL.

        Raises:
            RecipeError: there is no uv, or no variable that NeMo-RL insists on.
        """
        command = [*nemo_rl_python(), *self.arguments]
        if shutil.which(command[0]) is None:
            raise RecipeError(
                f"{command[0]} is not installed, and NeMo-RL is started with it: run this in NeMo-RL's container, or "
                "install uv (https://docs.astral.sh/uv); --dry-run needs neither"
            )
        if "TORCH_CUDA_ARCH_LIST" not in os.environ:
            raise RecipeError(
                "TORCH_CUDA_ARCH_LIST is not set, and NeMo-RL stops without it; its container sets it, elsewhere: "
                "export TORCH_CUDA_ARCH_LIST=9.0 (H100, H200), 8.0 (A100) or 10.0 (B200)"
            )
        os.chdir(self.root)
        sys.stderr.flush()
        os.execvpe(command[0], command, {**os.environ, **self.environment})


def prepare(recipe_path: Path, checkpoint: str | Path, overrides: list[str]) -> Launch:
    """Composes the recipe, fills in the checkpoint, and checks everything that can be checked without a GPU.

    Args:
        recipe_path: the YAML file.
        checkpoint: a Hugging Face folder, a run of ours, its checkpoints, or one of them.
        overrides: Hydra's ``key=value``.

    Raises:
        RecipeError, CheckpointError: everything that is wrong with them, in one message.
    """
    root = find_checkout()
    for key in _OURS:
        if any(override.lstrip("+~").startswith(key) for override in overrides):
            raise RecipeError(f"{key} is what --checkpoint gives; name the checkpoint there")
    start = read_starting_point(checkpoint)
    first = compose(root, recipe_path, overrides)
    if start.megatron is None and first.get("checkpointing.pretrained_checkpoint"):
        raise RecipeError(
            f"{recipe_path} starts from a Megatron checkpoint (checkpointing.pretrained_checkpoint), and {checkpoint} "
            "is a Hugging Face folder; name the run, or take the recipe without these keys"
        )
    cache = _cache(os.environ, start)
    ours, notes, found = _filled(first, start, cache)
    recipe = compose(root, recipe_path, [*overrides, *ours])
    sizes = layout(recipe)
    found += ignored_faults(recipe) + fit_faults(start, recipe, sizes) + _allocation(os.environ, sizes)
    run_folder = Path(recipe.get("checkpointing.checkpoint_dir"))
    found += _resume_faults(run_folder, start, notes) if recipe.get("checkpointing.enabled") else []
    found += _missing_data(recipe)
    gym = recipe.get("env.should_use_nemo_gym")
    script = "./examples/nemo_gym/run_grpo_nemo_gym.py" if gym else "./examples/run_grpo.py"
    if not (root / script).is_file():
        raise RecipeError(f"{root} has no {script}; {HOW_TO_GET}")
    environment = {"NEMO_RL_DIR": str(root)} | ({_CACHE: str(cache)} if start.megatron is None else {})
    arguments = [script, "--config", str(recipe_path.resolve()), *overrides, *ours]
    verdict = ask_nemo_rl(root, arguments, environment, recipe)
    found += verdict.faults
    if not verdict.looked:
        found += size_faults(recipe, sizes)
        notes.append(f"NeMo-RL itself has not checked this recipe: {verdict.unchecked}")
    elif verdict.unchecked:
        notes.append(f"NeMo-RL has checked this recipe but for a part: {verdict.unchecked}")
    if found:
        listed = "".join(f"\n  {fault}" for fault in found)
        count = f"{len(found)} fault{'' if len(found) == 1 else 's'}"
        raise RecipeError(f"{recipe_path} cannot start from {checkpoint}: {count}:{listed}")
    return Launch(root, arguments, environment, recipe, sizes, notes)


def _filled(recipe: Composed, start: StartingPoint, cache: Path) -> tuple[list[str], list[str], list[str]]:
    """The overrides that this start adds, notes, and faults."""
    ours = [_override("policy.model_name", start.hf)]
    notes: list[str] = []
    if start.megatron is not None:
        section = "++checkpointing.pretrained_checkpoint"
        ours += [_override(f"{section}.path", start.megatron), f"{section}.format=megatron_lm"]
    elif reason := stale_conversion(start, cache):
        ours.append("policy.megatron_cfg.force_reconvert_from_hf=true")
        notes.append(f"NeMo-RL converts the checkpoint again: {reason}")
    for key in ("checkpointing.checkpoint_dir", "logger.log_dir"):  # NeMo-RL runs in its own folder
        ours += _absolute(key, recipe.get(key))
    for where, entry in data_sets(recipe):
        ours += _absolute(f"{where}.data_path", entry.get("data_path"))
    more, found = _stop(recipe, start, notes)
    return ours + more, notes, found


def _override(key: str, value: str | Path) -> str:
    """``key=value`` in Hydra's grammar, which gives some characters a meaning."""
    text = str(value)
    if not re.fullmatch(r"[\w./-]+", text):
        text = "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return f"{key}={text}"


def _absolute(key: str, value: str | None) -> list[str]:
    """An override for a relative path; names of data sets on a hub, which no file here has, stay."""
    if not value or os.path.isabs(value) or (key.endswith("data_path") and not _is_file_name(value)):
        return []
    return [_override(key, os.path.abspath(value))]


def _is_file_name(value: str) -> bool:
    return bool(Path(value).suffix) or Path(value).exists()


def _missing_data(recipe: Composed) -> list[str]:
    return [
        f"{where}.data_path: no file {entry['data_path']}"
        for where, entry in data_sets(recipe)
        if os.path.isabs(entry.get("data_path") or "") and not os.path.exists(entry["data_path"])
    ]


def _stop(recipe: Composed, start: StartingPoint, notes: list[str]) -> tuple[list[str], list[str]]:
    """(overrides, faults) about the tokens that end an answer."""
    tokenizer = recipe.get("policy.tokenizer", {})
    if recipe.get("policy.generation.stop_token_ids") or "chat_template" in tokenizer:
        return [], []
    try:
        ids = stop_token_ids(str(start.hf))
    except ImportError:
        notes.append("transformers is not installed: not checked whether the tokenizer's EOS ends an answer")
        return [], []
    except ValueError as error:
        return [], [f"{start.hf}: its chat template cannot be used: {error}"]
    if ids is None:
        return [], []
    if recipe.get("env.should_use_nemo_gym"):
        return [], [
            f"the chat template ends an answer with token {ids[-1]}, which is not the tokenizer's eos_token, and "
            f"NeMo-Gym takes no stop_token_ids; make it the eos_token in {start.hf / 'tokenizer_config.json'}"
        ]
    notes.append(f"answers end at the tokens {ids}: the tokenizer's EOS and the one that ends a turn")
    return [f"policy.generation.stop_token_ids={ids}".replace(" ", "")], []


def _cache(environment: Mapping[str, str], start: StartingPoint) -> Path:
    """Where NeMo-RL keeps conversions: its own rule, save that the home folder is not mounted in containers."""
    if named := environment.get(_CACHE, "").strip():
        return Path(named).absolute()
    if home := environment.get("HF_HOME", "").strip():
        return Path(home).absolute() / "nemo_rl"
    return start.hf.parent / "nemo_rl_conversions"


def stale_conversion(start: StartingPoint, cache: Path) -> str | None:
    """Why the conversion that NeMo-RL keeps for this path must not be used; None if it may, or there is none.

    NeMo-RL's cache goes by the path alone: it would train other weights that were at this path before.
    """
    converted = cache / f"model_{str(start.hf).replace('/', '_')}" / "iter_0000000"
    if not converted.is_dir():
        return None
    if not all((converted / name).is_file() for name in ("metadata.json", "run_config.yaml")):
        return f"{converted} is not whole"
    if _newest(start.files()) >= min(path.stat().st_mtime for path in converted.iterdir()):
        return f"{start.hf} is newer than {converted}"
    return None


def _newest(paths: Iterable[Path]) -> float:
    """When these were last changed or put here: copies may keep the time of the original, not the inode's."""
    return max(max(status.st_mtime, status.st_ctime) for status in (path.stat() for path in paths))


def _allocation(environment: Mapping[str, str], sizes: Layout) -> list[str]:
    """cluster.* against the Slurm job this runs in, which NeMo-RL does not compare."""
    found = []
    nodes = environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES")
    if nodes:
        head = int(environment.get("DEDICATED_RAY_HEAD") or 0)
        if int(nodes) - head != sizes.num_nodes:
            wanted = f"{sizes.num_nodes + head} node(s){' (one for the Ray head)' if head else ''}"
            found.append(
                f"cluster.num_nodes is {sizes.num_nodes} and the Slurm job has {nodes} node(s); ask for {wanted} with "
                f"--nodes={sizes.num_nodes + head}, or override cluster.num_nodes"
            )
    gpus = environment.get("SLURM_GPUS_ON_NODE")
    if gpus and gpus.isdigit() and int(gpus) != sizes.gpus_per_node:
        found.append(
            f"cluster.gpus_per_node is {sizes.gpus_per_node} and the Slurm job has {gpus} GPU(s) a node; they must "
            "be equal"
        )
    return found


def _resume_faults(folder: Path, start: StartingPoint, notes: list[str]) -> list[str]:
    """NeMo-RL goes on with whatever run checkpoint_dir holds, also with one that began elsewhere."""
    steps = {
        int(path.name[5:]): path / "config.yaml"
        for path in folder.glob("step_*")
        if path.name[5:].isdigit() and (path / "config.yaml").is_file()
    }
    if not steps:
        return []
    try:
        old = yaml.safe_load(steps[max(steps)].read_text(encoding="utf-8"))
        began = str(old["policy"]["model_name"])
        pretrained = (old["checkpointing"].get("pretrained_checkpoint") or {}).get("path")
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        return [f"{steps[max(steps)]} cannot be read: {error}; give another checkpointing.checkpoint_dir"]
    way_out = "give another checkpointing.checkpoint_dir, or remove that folder"
    if began != str(start.hf) or (pretrained or None) != (str(start.megatron) if start.megatron else None):
        return [f"{folder} holds a run that began at {pretrained or began}; {way_out}"]
    if _newest(start.files()) >= steps[min(steps)].stat().st_mtime:
        return [f"{folder} holds a run that began before {start.megatron or start.hf} was changed; {way_out}"]
    notes.append(f"{folder} holds {max(steps)} steps of this run, which goes on from there")
    return []
