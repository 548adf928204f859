"""Whatever lies in a folder of weights or prepared data: it is read, or refused by name."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pear_megatron.data import DataConfig, DataError, TrajectoryDataset, prepare
from pear_megatron.errors import CheckpointError, RecipeError
from pear_megatron.hf.mapping import parameters
from pear_megatron.hf.weights import INDEX, HFWeights
from pear_megatron.recipe import ModelConfig
from pear_megatron.recipe.hf_config import model_keys
from tests.fuzz.rows import WITH_IDS
from tests.fuzz.test_rows import as_lines
from tests.fuzz.values import damaged, damaged_bytes, examples, folder_alone

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 11, "hidden_size": 8,
    "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "layer_types": ["full_attention"], "hidden_act": "silu",
}  # fmt: skip
MIXTURE = {
    **CONFIG, "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 4, "shared_expert_intermediate_size": 4,
}  # fmt: skip


def model_of(folder: Path) -> ModelConfig:
    return ModelConfig.model_validate(model_keys(folder))


@examples(60)
@given(config=st.sampled_from([CONFIG, MIXTURE]).flatmap(damaged))
def test_config_json(config: Any) -> None:
    with folder_alone() as folder:
        (folder / "config.json").write_text(json.dumps(config))
        try:
            model_of(folder)
        except RecipeError as error:
            assert str(folder / "config.json") in str(error)


@functools.cache
def weights() -> bytes:
    from safetensors.torch import save

    keys = {**model_keys_of(CONFIG)}
    tensors = {
        part.name: torch.zeros(part.shape)
        for parameter in parameters(ModelConfig.model_validate(keys))
        for part in parameter.parts
    }
    return bytes(save(tensors, {"format": "pt"}))


def model_keys_of(config: dict[str, Any]) -> dict[str, Any]:
    with folder_alone() as folder:
        (folder / "config.json").write_text(json.dumps(config))
        return model_keys(folder)


def open_or_refuse(folder: Path) -> None:
    model = model_of(folder)
    try:
        with HFWeights(folder, model) as found:
            for parameter in parameters(model):
                for part in parameter.parts:
                    assert tuple(found.read(part.name, None, 0, 0).shape) == part.shape
    except CheckpointError as error:
        assert str(folder) in str(error)


@examples(60)
@given(data=st.data())
def test_safetensors(data: st.DataObject) -> None:
    size = int.from_bytes(weights()[:8], "little")
    header, body = json.loads(weights()[8 : 8 + size]), weights()[8 + size :]
    text = json.dumps(data.draw(damaged(header))).encode()
    with folder_alone() as folder:
        (folder / "config.json").write_text(json.dumps(CONFIG))
        content = len(text).to_bytes(8, "little") + text + body
        (folder / "model.safetensors").write_bytes(data.draw(damaged_bytes(content)))
        open_or_refuse(folder)


@examples(60)
@given(data=st.data())
def test_index(data: st.DataObject) -> None:
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {
            name: "a.safetensors" for name in sorted(json.loads(header_of(weights()))) if name[0] != "_"
        },
    }
    with folder_alone() as folder:
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "a.safetensors").write_bytes(weights())
        (folder / INDEX).write_text(json.dumps(data.draw(damaged(index))))
        open_or_refuse(folder)


def header_of(content: bytes) -> bytes:
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


@functools.cache
def cache() -> dict[str, bytes]:
    """The files of a prepared data set."""
    with folder_alone() as folder:
        (folder / "a.jsonl").write_bytes(as_lines([WITH_IDS[4]] * 3))
        from pear_megatron.data.columns import ALL_COLUMNS

        config = DataConfig(train=[str(folder / "a.jsonl")], seq_length=16, cache_dir=str(folder / "cache"))
        made = prepare(config, columns=ALL_COLUMNS)
        return {path.name: path.read_bytes() for path in made.iterdir()}


@examples(60)
@given(data=st.data())
def test_prepared_data(data: st.DataObject) -> None:
    files = dict(cache())
    victim = data.draw(st.sampled_from([*files, "meta.json"]))
    what = data.draw(st.sampled_from(["bytes", "swapped", "missing", "values"]))
    if what == "bytes":
        files[victim] = data.draw(damaged_bytes(files[victim]))
    elif what == "swapped":
        files[victim] = files[data.draw(st.sampled_from(list(files)))]
    elif what == "missing":
        del files[victim]
    elif victim == "meta.json":
        files[victim] = json.dumps(data.draw(damaged(json.loads(files[victim])))).encode()
    else:
        array = np.load(io.BytesIO(files[victim]))
        if "offsets" in victim or "counts" in victim or "num_decisions" in victim:
            array[data.draw(st.integers(0, len(array) - 1))] += data.draw(st.integers(1, 99))
        stream = io.BytesIO()
        np.save(stream, array)
        files[victim] = stream.getvalue()
    with folder_alone() as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        try:
            dataset = TrajectoryDataset.open(folder)
            found = list(dataset)
        except DataError as error:
            assert "data cache" in str(error)
            return
        assert len(found) == 3
        for trajectory in found:
            assert len(trajectory.input_ids) == len(trajectory.loss_mask) == len(trajectory.behavior_logprobs)
            if trajectory.behavior_topk is not None:
                assert len(trajectory.behavior_topk.ids) == trajectory.behavior_topk.counts.sum()
        dataset.fingerprint()
