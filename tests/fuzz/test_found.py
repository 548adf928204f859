"""What fuzzing found, one plain case each: before it was mended, a traceback, or nothing at all."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_megatron.data import DataConfig, DataError, TrajectoryDataset, prepare
from pear_megatron.data.columns import ALL_COLUMNS
from pear_megatron.data.errors import RowProblem
from pear_megatron.data.files import Row
from pear_megatron.errors import CheckpointError, RecipeError
from pear_megatron.hf.weights import INDEX
from pear_megatron.megatron.checkpoint.paths import damage
from pear_megatron.recipe import load_recipe
from pear_megatron.recipe.hf_config import model_config
from pear_megatron.score.chunks import WorkFolder
from pear_megatron.score.rows import RowReader
from tests.fuzz import test_folders
from tests.fuzz.rows import IDS, WITH_IDS
from tests.fuzz.values import folder_alone


def refused(file: Path, **options: Any) -> str:
    config = DataConfig(train=[str(file)], seq_length=16, cache_dir=str(file.parent / "cache"), **options)
    with pytest.raises(DataError) as raised:
        prepare(config, columns=ALL_COLUMNS)
    return str(raised.value)


def test_json_that_is_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + "\n")
    assert "a.jsonl:1: not valid JSON: nested too deep" in refused(tmp_path / "a.jsonl")


def test_a_map_where_parquet_should_have_lists(tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.float32())
    good = {name: pa.array([value]) for name, value in WITH_IDS[3].items()}
    pq.write_table(
        pa.table({**good, "behavior_topk_ids": pa.array([[("7", 0.5)]], type=kind)}), tmp_path / "a.parquet"
    )
    assert "a.parquet:1: behavior_topk_ids = {'7': 0.5} is a dict; it must be" in refused(
        tmp_path / "a.parquet"
    )


def test_a_file_name_that_no_disk_takes(tmp_path: Path) -> None:
    assert "is no path (" in refused(tmp_path / f"{'a' * 300}.jsonl")


def test_half_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({**IDS, "id": "\ud83d"}) + "\n")
    assert "a.jsonl:1: id = '\\ud83d' holds half a character" in refused(tmp_path / "a.jsonl")
    counts: Counter[str] = Counter()
    read = RowReader("import", counts)
    rows = read(Row("a:1", {**IDS, "metadata": {"text": "\ud83d"}}, 1))
    work = WorkFolder(tmp_path / "scored.parquet")
    work.start({})
    work.write_chunks(rows, counts, max_rows=1, max_tokens=9)
    work.finish(counts, 1, scored=False)
    (metadata,) = pq.read_table(work.output)["metadata"].to_pylist()
    assert json.loads(metadata)["metadata"] == {"text": "\ud83d"}
    with pytest.raises(RowProblem, match="tokenizer_hash = .* holds half a character"):
        read(Row("a:2", {**IDS, "tokenizer_hash": "\ud83d"}, 1))


def test_files_of_prepared_data_that_do_not_belong_together() -> None:
    whole = test_folders.cache()
    for victim, content in {
        "offsets.npy": whole["id_offsets.npy"],
        "rewards.npy": whole["num_decisions.npy"],
        "topk_offsets.npy": whole["id_offsets.npy"],
        "input_ids.npy": whole["input_ids.npy"].replace(b"{'descr'", b"z'descr'"),
        "meta.json": whole["meta.json"].replace(b'"notes": {', b'"notes": {"x": "y",').replace(b",}", b"}"),
    }.items():
        with folder_alone() as folder:
            for name, data in {**whole, victim: content}.items():
                (folder / name).write_bytes(data)
            with pytest.raises(DataError, match="not a whole data cache"):
                TrajectoryDataset.open(folder)


def test_a_trajectory_whose_top_k_is_anothers() -> None:
    with folder_alone() as folder:
        for name, data in test_folders.cache().items():
            (folder / name).write_bytes(data)
        offsets = np.load(folder / "topk_offsets.npy")
        offsets[1] += 1
        np.save(folder / "topk_offsets.npy", offsets)
        with pytest.raises(DataError, match="trajectory 0 of the data cache has other behavior_topk_ids"):
            TrajectoryDataset.open(folder)[0]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("layer_types", [[]], "layer_types is [[]]; only a list of 'full_attention'"),
        ("num_key_value_heads", 3, "num_attention_heads 2 is not divisible by num_query_groups 3"),
    ],
)
def test_config_json(tmp_path: Path, key: str, value: Any, said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**test_folders.CONFIG, key: value}))
    with pytest.raises(RecipeError) as raised:
        model_config(tmp_path)
    assert str(tmp_path / "config.json") in str(raised.value)
    assert said in str(raised.value)


@pytest.mark.parametrize("name", [None, 7, "", "..", "../b/a.safetensors", "/etc/passwd", "a" * 300, "a\0b"])
def test_an_index_of_weights_that_names_no_file_of_its_folder(name: Any) -> None:
    with folder_alone() as folder:
        (folder / "config.json").write_text(json.dumps(test_folders.CONFIG))
        (folder / "a.safetensors").write_bytes(test_folders.weights())
        (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(
            CheckpointError, match=r"puts tensor model\.norm\.weight into .*, which is no file's name"
        ):
            test_folders.HFWeights(folder, test_folders.model_of(folder))


def test_sizes_of_a_checkpoints_files_that_are_no_list_of_them(tmp_path: Path) -> None:
    for name in ("metadata.json", ".metadata"):
        (tmp_path / name).touch()
    for content in ("[1]", "7", '{"../x": 1}', json.dumps({"a" * 300: 1})):
        (tmp_path / "files.json").write_text(content)
        assert damage(tmp_path)


def test_recipes(tmp_path: Path) -> None:
    marker, file = tmp_path / "it-ran", tmp_path / "a.yaml"
    (tmp_path / "parent.yaml").write_text("data: {train: [x]}\n")
    for text, said in {
        "defaults: parent.yaml\ndata: {train: {a: 1}}": "data.train: a mapping here and a list in what it inherits",
        "defaults: parent.yaml\ndata: [1]": "data: a list here and a mapping in what it inherits from",
        "defaults: {a: b}": "defaults: the path of a recipe, or a list of them",
        "defaults: [1]": "defaults: the path of a recipe, or a list of them",
        f"seed: !!python/object/apply:os.system ['touch {marker}']": "not valid YAML",
        "seed: ${eval:1+1}": "Unsupported interpolation type eval",
        "[" * 3000: "not valid YAML",
    }.items():
        file.write_text(text)
        with pytest.raises(RecipeError) as raised:
            load_recipe(file)
        assert str(file) in str(raised.value)
        assert said in str(raised.value)
    assert not marker.exists()
