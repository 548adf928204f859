"""A checkpoint may be anybody's: what its pickles name is refused unless it is known, and nothing of it is run."""

from __future__ import annotations

import io
import os
import pickle
from argparse import Namespace
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from pear_megatron.errors import CheckpointError
from pear_megatron.megatron.checkpoint import state
from pear_megatron.megatron.checkpoint.restricted import check_objects, read_common, read_index
from pear_megatron.megatron.checkpoint.stored import StoredParameters

RNG = "rng_state/shard_0_1"
EXTRA = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_1"


class Command:
    """An object that runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def command(tmp_path: Path) -> Any:
    """The object; the test fails if it was run."""
    marker = tmp_path / "it-ran"
    yield Command(marker)
    assert not marker.exists()


def checkpoint(folder: Path, *, common: Any = None, extra: Any = None, key: str = RNG) -> Path:
    """A checkpoint of one tensor and one object."""
    folder.mkdir()
    dcp.save(
        {"embedding.x": torch.zeros(3), key: extra},
        storage_writer=dcp.FileSystemWriter(str(folder)),
        planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
        no_dist=True,
    )
    torch.save(common or {"step": 3, "args": Namespace(num_layers=2)}, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "common_backend": "torch"}')
    return folder


def test_what_a_checkpoint_of_ours_holds_is_read(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", extra={"python": (3, (1, 2), None), "torch": torch.get_rng_state()})
    assert read_common(folder)["step"] == 3
    assert list(read_index(folder).state_dict_metadata) == ["embedding.x", RNG]
    check_objects(folder, [RNG, "absent/shard_0_1"])


def test_commands_in_the_index_are_not_run(tmp_path: Path, command: Any) -> None:
    folder = checkpoint(tmp_path / "a")
    (folder / ".metadata").write_bytes(pickle.dumps(command))
    for read in (
        read_index,
        lambda path: StoredParameters(path, None),  # type: ignore[arg-type]
        lambda path: check_objects(path, [RNG]),
    ):
        with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: .*it names posix\.system"):
            read(folder)


def test_commands_beside_the_shards_are_not_run(tmp_path: Path, command: Any) -> None:
    folder = checkpoint(tmp_path / "a", common={"step": 1, "args": command})
    for read in (read_common, lambda path: state.load(path, None)):
        with pytest.raises(CheckpointError, match=r"common\.pt cannot be read: it names posix\.system"):
            read(folder)


def test_what_stands_beside_the_shards_may_stand_among_them(tmp_path: Path, command: Any) -> None:
    """Megatron-Core 0.19 writes no common.pt."""

    def among(name: str, common: Any) -> Path:
        folder = checkpoint(tmp_path / name)
        (folder / "common.pt").unlink()
        dcp.save(
            {"common_state/shard_0_1": common},
            storage_writer=dcp.FileSystemWriter(str(folder)),
            planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
            no_dist=True,
        )
        return folder

    assert read_common(among("good", [{"step": 7}]))["step"] == 7
    with pytest.raises(
        CheckpointError, match=r"object common_state/shard_0_1 cannot be read: it names posix\.system"
    ):
        state.load(among("bad", [{"args": command}]), None)
    with pytest.raises(CheckpointError, match=r"has neither common\.pt nor an object"):
        read_common(among("odd", "x"))


def test_commands_among_the_shards_are_not_run(tmp_path: Path, command: Any) -> None:
    folder = checkpoint(tmp_path / "a", extra=command)
    with pytest.raises(
        CheckpointError, match=r"\.distcp: object rng_state/shard_0_1 cannot be read: it names posix"
    ):
        check_objects(folder, [RNG])


def as_bytes_in_a_tensor(content: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)


def test_commands_in_an_fp8_layers_own_state_are_not_run(tmp_path: Path, command: Any) -> None:
    hidden = io.BytesIO()
    torch.save(as_bytes_in_a_tensor(command), hidden)
    by_oldest_protocol = pickle.dumps(command, protocol=0)
    by_oldest_protocol += b" " * (-len(by_oldest_protocol) % 8)
    wrapped = [
        as_bytes_in_a_tensor({"recipe": command}),
        hidden,
        *(
            torch.frombuffer(bytearray(by_oldest_protocol), dtype=dtype)
            for dtype in (torch.uint8, torch.int8, torch.float32)
        ),
    ]
    for k, extra in enumerate(wrapped):
        with pytest.raises(CheckpointError, match=r"it names posix\.system"):
            check_objects(checkpoint(tmp_path / f"{k}", extra=[extra], key=EXTRA), [EXTRA])
    legacy = io.BytesIO()  # four pickles, one after another; the command is in the last
    torch.save(command, legacy, _use_new_zipfile_serialization=False)
    for k, (file, said) in enumerate(
        ((legacy, r"it names posix\.system"), (io.BytesIO(pickle.dumps([command])), r"it holds more than"))
    ):
        with pytest.raises(CheckpointError, match=rf"_extra_state/shard_0_1 cannot be read: {said}"):
            check_objects(checkpoint(tmp_path / f"file-{k}", extra=[file], key=EXTRA), [EXTRA])
    rows = {"a": as_bytes_in_a_tensor(command)}
    with pytest.raises(CheckpointError, match="it is a dict; Megatron-Core stores a list"):
        check_objects(checkpoint(tmp_path / "rows", extra=rows, key=EXTRA), [EXTRA])
    harmless = as_bytes_in_a_tensor(OrderedDict(scale=torch.ones(2), recipe=None))
    for k, extra in enumerate((harmless, torch.empty(0, dtype=torch.uint8), None)):
        check_objects(checkpoint(tmp_path / f"harmless-{k}", extra=[extra], key=EXTRA), [EXTRA])


class Shadowed:
    """Pickled, an OrderedDict of these entries that says it has none."""

    def __init__(self, entries: dict[Any, Any]) -> None:
        self.entries = entries

    def __reduce__(self) -> Any:
        return (
            OrderedDict,
            (),
            {"values": OrderedDict, "items": OrderedDict},
            None,
            iter(self.entries.items()),
        )


def test_an_index_cannot_show_one_object_here_and_another_to_torch(tmp_path: Path, command: Any) -> None:
    folder = checkpoint(tmp_path / "a", extra="harmless")
    torch.save(command, folder / "evil.distcp")
    index = read_index(folder)
    good = index.storage_data[MetadataIndex(RNG)]
    evil = replace(
        good, relative_path="evil.distcp", offset=0, length=(folder / "evil.distcp").stat().st_size
    )
    called_an_object = BytesStorageMetadata()
    called_an_object.size = torch.Size([3])  # type: ignore[attr-defined] # which is all that Megatron-Core asks
    as_object = {**index.state_dict_metadata, "embedding.x": called_an_object}
    compressed = {MetadataIndex(RNG): replace(good, transform_descriptors=["stream.zstd/1"])}
    twice = {MetadataIndex(RNG): evil, MetadataIndex(RNG, torch.Size([0])): good}
    for changed, said in (
        (replace(index, storage_data=twice), r"it names posix\.system"),
        (replace(index, storage_data=Shadowed({MetadataIndex(RNG): evil})), "no plain dicts"),  # type: ignore[arg-type]
        (replace(index, state_dict_metadata=as_object), r"calls embedding\.x an object"),
        (replace(index, storage_data=compressed), "is compressed"),
    ):
        (folder / ".metadata").write_bytes(pickle.dumps(changed))
        with pytest.raises(CheckpointError, match=said):
            check_objects(folder, [RNG])


def test_shards_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a")
    index = read_index(folder)
    for name in ("../b/__0_0.distcp", str(folder / "__0_0.distcp"), ".."):
        moved = {key: replace(place, relative_path=name) for key, place in index.storage_data.items()}
        (folder / ".metadata").write_bytes(pickle.dumps(replace(index, storage_data=moved)))
        with pytest.raises(CheckpointError, match="which is no file of that folder"):
            read_index(folder)


def test_other_formats_and_other_things_are_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a")
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match="in the format 'zarr'; torch_dist is read here"):
        read_common(folder)
    (folder / "metadata.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"metadata\.json cannot be read"):
        read_common(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(torch.Size([1])))
    with pytest.raises(CheckpointError, match="it holds a Size"):
        read_index(folder)
