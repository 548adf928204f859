"""GRPO from our own Megatron checkpoint: what NeMo-RL and Megatron-Bridge look for in it is there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pear_megatron.errors import RecipeError
from pear_megatron.hf.assets import MODEL_FILE
from pear_megatron.megatron.checkpoint.paths import resolve
from pear_megatron.megatron.checkpoint.state import read_common
from pear_megatron.rl.nemo_rl.launch import prepare
from tests.distributed import run_ranks
from tests.hf.models import save_model, save_tokenizer
from tests.hf.ranks import rank_convert

RECIPES = Path(__file__).parents[3] / "recipes" / "grpo"
SHORT = ["policy.max_total_sequence_length=1024"]  # the small model's context


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3 as `pear-megatron convert` leaves it."""
    pytest.importorskip("transformers", reason="needs the extra hf")
    folder = tmp_path_factory.mktemp("megatron")
    source = save_tokenizer(save_model("qwen3", folder / "source"))
    run_ranks(1, rank_convert, {"qwen3": source}, folder, 1, 1)
    return folder / "qwen3"


@pytest.mark.parametrize("recipe", ["qwen2.5-7b", "qwen2.5-7b_from_megatron"])
def test_weights_come_from_the_checkpoint_and_the_rest_from_its_hf_folder(
    nemo_rl: Path, converted: Path, recipe: str
) -> None:
    launch = prepare(RECIPES / f"{recipe}.yaml", converted, SHORT)
    assert launch.recipe.get("checkpointing.pretrained_checkpoint") == {
        "path": str(resolve(converted)),
        "format": "megatron_lm",
    }
    assert launch.recipe.get("policy.model_name") == str(converted / "hf")
    assert not launch.recipe.get("policy.megatron_cfg.force_reconvert_from_hf")
    assert "NRL_MEGATRON_CHECKPOINT_DIR" not in launch.environment


def test_a_step_can_be_named(nemo_rl: Path, converted: Path) -> None:
    launch = prepare(RECIPES / "qwen2.5-7b.yaml", resolve(converted), SHORT)
    assert launch.recipe.get("checkpointing.pretrained_checkpoint.path") == str(resolve(converted))


def test_checkpoint_has_what_nemo_rl_and_megatron_bridge_read(converted: Path) -> None:
    folder = resolve(converted)
    assert (folder / "metadata.json").is_file()  # NeMo-RL: megatron/setup.py, _resolve_iter_dir_from_root
    common = read_common(folder)  # Megatron-Bridge: _extract_megatron_lm_args_from_state_dict
    args = common["args"]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (1, 1)
    assert args.no_save_optim
    assert args.no_save_rng
    assert common["checkpoint_version"] >= 2.0  # below, Megatron-LM reorders the query, key and value weights


def test_a_checkpoint_without_its_hugging_face_files_is_refused(
    nemo_rl: Path, converted: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(converted / MODEL_FILE, tmp_path / "run")
    with pytest.raises(RecipeError, match="pear-megatron export"):
        prepare(RECIPES / "qwen2.5-7b.yaml", tmp_path / "run", SHORT)
