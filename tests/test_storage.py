"""Files and folders are replaced whole; of a link the link alone, and what it names stays as it is."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pear_megatron.data import DataConfig, TrajectoryDataset, prepare
from pear_megatron.errors import PearError, RecipeError
from pear_megatron.megatron.checkpoint.folder import CheckpointFolder
from pear_megatron.megatron.checkpoint.paths import FILES, LATEST, checkpoint_path, steps_on_disk
from pear_megatron.storage import (
    abandon,
    begin,
    check_output,
    check_same_settings,
    lock,
    partial_of,
    publish,
    read_settings,
    remove,
    write_atomically,
)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder outside the run's, with something in it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("x")
    return tmp_path / "elsewhere"


def untouched(elsewhere: Path) -> bool:
    return (elsewhere / "precious").read_text() == "x" and len(list(elsewhere.iterdir())) == 1


@pytest.mark.parametrize("dangling", [False, True])
def test_a_folder_takes_the_place_of_a_link(tmp_path: Path, elsewhere: Path, dangling: bool) -> None:
    output = tmp_path / "run" / "export"
    output.parent.mkdir()
    output.symlink_to(tmp_path / "nowhere" if dangling else elsewhere)
    partial_of(output).mkdir()
    (partial_of(output) / "new").touch()
    publish(output)
    assert [path.name for path in output.iterdir()] == ["new"]
    assert not output.is_symlink()
    assert [path.name for path in output.parent.iterdir()] == ["export"]
    assert untouched(elsewhere)


def test_files_are_not_written_through_links(tmp_path: Path, elsewhere: Path) -> None:
    run, precious = tmp_path / "run", elsewhere / "precious"
    run.mkdir()
    for name in ("config.yaml", ".config.yaml.partial", ".lock"):
        (run / name).symlink_to(precious)
    write_atomically(run / "config.yaml", "new")
    assert (run / "config.yaml").read_text() == "new"
    with lock(run, patience=0.0):
        pass
    assert untouched(elsewhere)


def test_a_folder_behind_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    link = tmp_path / "run"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(PearError, match=r"run is a link to .*nowhere, which is not there"), lock(link):
        pass


def test_links_are_taken_away_alone(tmp_path: Path, elsewhere: Path) -> None:
    for target in (elsewhere, elsewhere / "precious", tmp_path / "nowhere"):
        link = tmp_path / "link"
        link.symlink_to(target)
        remove(link)
        assert not link.is_symlink()
    remove(tmp_path / "nowhere")
    assert untouched(elsewhere)


def test_a_checkpoint_that_is_a_link_is_read_and_its_link_removed(tmp_path: Path) -> None:
    root, disk = tmp_path / "checkpoints", tmp_path / "disk"
    folder = CheckpointFolder(root, 1)
    folder.tidy()
    for step in (1, 2):
        where = disk / f"{step}" if step == 1 else checkpoint_path(root, step)
        where.mkdir(parents=True)
        for name in ("metadata.json", ".metadata"):
            (where / name).write_text("x")
        (where / FILES).write_text('{".metadata": 1}')
    checkpoint_path(root, 1).symlink_to(disk / "1")
    assert folder.surplus(2) == [1]
    (root / f".{LATEST}.partial").symlink_to(disk / "1" / FILES)
    new = Path(folder.make_room(3, 0))
    (new / ".metadata").write_text("x")
    folder.commit(3, new, [])
    assert steps_on_disk(root) == [3]
    assert (disk / "1" / FILES).read_text() == '{".metadata": 1}'
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000003", LATEST]


def test_data_and_their_cache_are_reached_through_links(
    tmp_path: Path, elsewhere: Path, row_file: Callable[[Path], Path]
) -> None:
    file, link = row_file(elsewhere / "a.jsonl"), tmp_path / "b.jsonl"
    link.symlink_to(file)
    (tmp_path / "cache").symlink_to(elsewhere)
    config = DataConfig(train=[str(link)], seq_length=16, cache_dir=str(tmp_path / "cache"))
    folder = prepare(config)
    assert len(TrajectoryDataset.open(folder)) == 1
    (folder / "meta.json").write_text("{")
    moved = elsewhere / "moved"
    folder.resolve().rename(moved)
    folder.symlink_to(moved)
    assert len(TrajectoryDataset.open(prepare(config))) == 1  # made anew in the link's place
    assert (moved / "meta.json").read_text() == "{"


@pytest.fixture
def row_file() -> Callable[[Path], Path]:
    """Writes a row to a file."""

    def write(path: Path) -> Path:
        path.write_text(
            '{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1], "behavior_logprobs": [null, -0.1, -0.2]}\n'
        )
        return path

    return write


def test_settings_that_a_command_left_are_data(tmp_path: Path) -> None:
    marker, file = tmp_path / "run", tmp_path / "settings.yaml"
    for text in (
        f'a: !!python/object/apply:os.system ["touch {marker}"]',
        "- 1",
        "a: [",
        "!!bool x",
        "[" * 1500,
    ):
        file.write_text(text)
        with pytest.raises(RecipeError, match=r"settings\.yaml cannot be read: "):
            read_settings(file)
    assert not marker.exists()


def hold(folder: Path, started: Any, ends: Any) -> None:
    with lock(folder, "run"):
        started.set()
        ends.wait()


def test_a_folder_belongs_to_one_process_until_it_ends(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started, ends = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "run", started, ends))
    holder.start()
    assert started.wait(60)
    with (
        pytest.raises(
            PearError, match=r"another run is at work in .*run; wait for it, or choose another output_dir"
        ),
        lock(tmp_path / "run", "run", other="output_dir", patience=0.2),
    ):
        raise AssertionError("two hold it")
    holder.kill()
    with lock(tmp_path / "run", "run", patience=30.0):  # who was killed has let go
        holder.join()


def test_an_output_is_written_by_one_process(tmp_path: Path) -> None:
    begin(tmp_path / "out").joinpath("a").touch()
    with pytest.raises(
        PearError, match=r"another command is writing .*out; wait for it, or name another --output"
    ):
        begin(tmp_path / "out")
    publish(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    begin(tmp_path / "out")  # a later one
    abandon(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    left = tmp_path / ".out.partial"
    make(left, "of a process that was killed")
    assert list(begin(tmp_path / "out").iterdir()) == []
    abandon(tmp_path / "out")


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def test_what_an_output_is_made_from_is_not_overwritten(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "config.yaml", "checkpoints/iter_0000002/metadata.json")
    model = make(tmp_path / "model", "config.json", "model.safetensors")
    checkpoint = run / "checkpoints" / "iter_0000002"
    for output, source in (
        (run, run), (run, checkpoint), (tmp_path, run), (checkpoint, run), (checkpoint / "export", run), (model, model),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match="would remove what it is made from"):
            check_output(output, source=source, overwrite=True)
    with pytest.raises(RecipeError, match="holds more than an earlier export"):
        check_output(run / "checkpoints", source=run, overwrite=True)
    check_output(run / "export", source=run, overwrite=False)


def test_an_earlier_output_alone_is_overwritten(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "config.json")
    exported = make(tmp_path / "exported", "config.json", "model.safetensors", "tokenizer.json")
    converted = make(tmp_path / "converted", "model.yaml", "hf/config.json", "iter_0000000/a", LATEST)
    adapters = make(tmp_path / "adapters", "adapter_config.json", "adapter_model.safetensors")
    for earlier in (exported, converted, adapters):
        with pytest.raises(RecipeError, match="is not empty.*--overwrite"):
            check_output(earlier, source=source, overwrite=False)
        check_output(earlier, source=source, overwrite=True)
    for other in (
        make(tmp_path / "many", "a/config.json", "b/config.json"),
        make(tmp_path / "run", "model.yaml", "config.yaml", "metrics.jsonl", "checkpoints/iter_0000002/a"),
        make(tmp_path / "notes", "notes.txt"),
    ):
        with pytest.raises(RecipeError, match="holds more than an earlier export or conversion"):
            check_output(other, source=source, overwrite=True)


def test_what_differs_is_said_with_both_values() -> None:
    old, new = {"a": {"b": 1, "c": "x"}}, {"a": {"b": 2, "c": "x"}, "d": [1]}
    with pytest.raises(RecipeError, match=r"other settings: a.b 1 -> 2, d - -> \[1\]; go away"):
        check_same_settings("it", old, new, may_change=(), way_out="go away")
