"""Broken checkpoints are refused by file and tensor, and failures leave nothing that looks whole."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pear_megatron.errors import CheckpointError, PearError
from pear_megatron.hf.weights import HFWeights
from pear_megatron.megatron.checkpoint.export import export_checkpoint
from pear_megatron.recipe import ModelConfig
from pear_megatron.recipe.hf_config import model_keys
from tests.distributed import run_ranks
from tests.fuzz.values import damaged_bytes, examples, folder_alone
from tests.hf.ranks import rank_convert

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def folder(hf_models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a sound checkpoint, to be broken."""
    shutil.copytree(hf_models["qwen3"], tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def sharded(converted: dict[str, Path], tmp_path: Path) -> Path:
    """The same in several files."""
    export_checkpoint(converted["qwen3"], tmp_path / "sharded", max_shard_size=80_000)
    return tmp_path / "sharded"


def opened(folder: Path) -> None:
    HFWeights(folder, ModelConfig.model_validate(model_keys(folder))).__exit__()


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def rewrite(file: Path, **changes: torch.Tensor | None) -> None:
    """Changes tensors of a file; None takes one out."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def assert_refused(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        opened(folder)
    for part in parts:
        assert part in str(raised.value), str(raised.value)


def test_the_copies_are_sound(folder: Path, sharded: Path) -> None:
    opened(folder)
    opened(sharded)


def test_truncated_file(folder: Path, sharded: Path) -> None:
    for file in (folder / "model.safetensors", files_of(sharded)[1]):
        file.write_bytes(file.read_bytes()[:-100])
        assert_refused(file.parent, str(file), "not a whole safetensors file", "download it again")


def test_missing_extra_and_misshapen_tensors(folder: Path) -> None:
    file, name = folder / "model.safetensors", NORM.replace(".", "__")
    rewrite(file, **{name: None})
    assert_refused(folder, str(folder), f"tensor {NORM} of shape [32] is in none of its files")
    rewrite(file, **{name: torch.ones(31)})
    assert_refused(folder, str(file), f"tensor {NORM} has shape [31]", "[32]")
    rewrite(file, **{name: torch.ones(32, dtype=torch.int8)})
    assert_refused(folder, str(file), f"tensor {NORM} is of type I8")
    rewrite(file, **{name: torch.ones(32), "model__layers__4__input_layernorm__weight": torch.ones(32)})
    assert_refused(folder, str(file), "tensor model.layers.4.input_layernorm.weight has no place")


def test_files_and_index_that_disagree(sharded: Path) -> None:
    index, last = sharded / "model.safetensors.index.json", files_of(sharded)[-1]
    content = json.loads(index.read_text())
    moved = {**content["weight_map"], NORM: last.name}
    index.write_text(json.dumps({"weight_map": moved}))
    assert_refused(sharded, str(index), f"puts tensor {NORM} into {last.name}")
    index.write_text(json.dumps(content)[:50])
    assert_refused(sharded, str(index), "cannot be read")
    index.write_text(json.dumps(content))
    last.unlink()
    assert_refused(sharded, f"{last} is missing", "names it for 1 tensors")
    index.unlink()
    assert_refused(sharded, str(sharded), "holds no weights")


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert_refused(folder, "pytorch_model.bin is a pickle")


def test_redundant_tensors_of_older_files_are_passed_over(hf_models: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "hf"
    shutil.copytree(hf_models["qwen2"], folder)
    rewrite(
        folder / "model.safetensors",
        lm_head__weight=load_file(files_of(tmp_path / "hf")[0])[
            "model.embed_tokens.weight"
        ],  # the output layer
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),
    )
    opened(folder)


def test_a_head_of_its_own_is_not_lost_to_a_tied_embedding(
    hf_models: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(hf_models["qwen2"], tmp_path / "hf")
    rewrite(files_of(tmp_path / "hf")[0], lm_head__weight=torch.ones(259, 32))
    assert_refused(tmp_path / "hf", "tie_word_embeddings", "lm_head.weight holds other weights")


def test_weights_that_differ_anywhere_have_another_digest(folder: Path) -> None:
    from safetensors.torch import load_file

    from pear_megatron.megatron.checkpoint.model_folder import read_model_facts

    digests = {read_model_facts(folder).digest}
    (file,) = files_of(folder)
    names = [name for name, tensor in load_file(file).items() if tensor.dim() == 2]
    for name in names:
        rewrite(file, **{name.replace(".", "__"): load_file(file)[name] + 1})
        digests.add(read_model_facts(folder).digest)
    assert len(digests) == len(names) + 1


def test_damaged_checkpoint_is_refused_and_nothing_is_left(
    converted: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    shutil.copytree(converted["llama2-bf16"], checkpoint)
    data = sorted((checkpoint / "iter_0000000").glob("*.distcp"))[0]
    data.write_bytes(data.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=data.name):
        export_checkpoint(checkpoint, out)
    (checkpoint / "iter_0000000" / "files.json").unlink()  # the damage is then found on the way
    with pytest.raises(CheckpointError, match=r"parameter .* cannot be read"):
        export_checkpoint(checkpoint, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


@examples(25)
@given(data=st.data())
def test_whatever_is_in_a_checkpoint_an_export_is_whole_or_not_there(
    converted: dict[str, Path], data: st.DataObject
) -> None:
    root = converted["llama2-bf16"]
    files = {path.name: path.read_bytes() for path in (root / "iter_0000000").iterdir()}
    if data.draw(st.booleans()):
        del files["files.json"]  # the damage is then found on the way
    victim = data.draw(st.sampled_from(sorted(files)))
    what = data.draw(st.sampled_from(["bytes", "bytes", "swapped", "missing"]))
    if what == "missing":
        del files[victim]
    else:
        other = files[data.draw(st.sampled_from(sorted(files)))]
        files[victim] = other if what == "swapped" else data.draw(damaged_bytes(files[victim]))
    with folder_alone() as folder:
        checkpoint = folder / "checkpoint" / "iter_0000000"
        checkpoint.mkdir(parents=True)
        shutil.copy(root / "model.yaml", folder / "checkpoint")
        for name, content in files.items():
            (checkpoint / name).write_bytes(content)
        try:
            export_checkpoint(checkpoint, folder / "out")
        except PearError:
            assert not (folder / "out").exists()
        else:
            opened(folder / "out")


def rank_on_a_full_disk(rank: int, task: str, source: Path, output: Path) -> str:
    """The message of an export or a conversion whose files may not grow beyond 50 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    try:
        if task == "export":
            export_checkpoint(source, output)
        else:
            rank_convert(rank, {"out": source}, output.parent, 2, 1)
    except PearError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "no error"


@pytest.mark.parametrize("task", ["export", "convert"])
def test_full_disk_leaves_nothing_and_every_rank_hears_of_it(
    converted: dict[str, Path], hf_models: dict[str, Path], tmp_path: Path, task: str
) -> None:
    source = converted["qwen3"] if task == "export" else hf_models["qwen3"]
    messages = run_ranks(2, rank_on_a_full_disk, task, source, tmp_path / "out")
    place = tmp_path / "out"
    reason = f"File too large: '{place}'" if task == "export" else "cannot be written"
    assert all(reason in message for message in messages), messages
    assert list(tmp_path.iterdir()) == []
