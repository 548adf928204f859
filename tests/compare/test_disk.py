"""What a comparison writes is what it said it would, and a finished cell keeps its models and no checkpoints."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the extra rl")
pytest.importorskip("scipy", reason="needs the extra eval")
pytest.importorskip("matplotlib", reason="needs the extra plot")

from pear_megatron.compare.cell import Cell, cells_of
from pear_megatron.compare.disk import bytes_in, cell_disk
from pear_megatron.compare.recipe import load_compare_recipe
from tests.compare import tiny
from tests.compare.test_recipe import refusal

# Logs, metrics, tokenizers and the files' own heads are in no formula, and count in so small a model.
_FACTOR = 1.3


class Largest:
    """The most bytes that a folder held while this was entered, looked at every twentieth of a second."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bytes = folder, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._done.wait(0.05):
            try:
                self.bytes = max(self.bytes, bytes_in(self.folder))
            except FileNotFoundError:  # it went while we looked
                continue

    def __enter__(self) -> Largest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def cells(config: Path, *overrides: str) -> list[Cell]:
    return cells_of(load_compare_recipe(config, list(overrides)), {})


@pytest.mark.slow
def test_a_cell_takes_and_keeps_what_was_said(tmp_path: Path) -> None:
    base = tiny.values(tmp_path)
    overrides = [*base["offline"]["overrides"], "checkpoint.save_interval=1", "checkpoint.keep_last=1"]
    arms = {"SFT": base["arms"]["SFT"], "no offline phase": None}
    config = tiny.write(tmp_path, arms=arms, tune=None, offline={**base["offline"], "overrides": overrides})
    trained = cells(config)[0]
    with Largest(trained.folder) as largest:
        said = tiny.compare(config, "+keep=all")
    assert "2 cell(s) to run, 1 at once, take up to" in said
    assert "dropped" not in said
    everything = cell_disk(cells(config, "+keep=all")[0])
    for there, predicted in ((bytes_in(trained.folder), everything.kept), (largest.bytes, everything.most)):
        assert predicted / _FACTOR < there < predicted * _FACTOR
    results = tiny.results(tmp_path)

    said = tiny.compare(config)
    assert "to run" not in said  # both are done
    assert "dropped" in said
    for cell in cells(config):
        predicted = cell_disk(cell).kept
        assert predicted / _FACTOR < bytes_in(cell.folder) < predicted * _FACTOR
    assert bytes_in(trained.folder) < everything.kept / 2
    assert tiny.results(tmp_path)["arms"] == results["arms"]
    assert "dropped" not in tiny.compare(config)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    base = tiny.values(tmp_path)
    large = [*base["offline"]["overrides"], "model.num_layers=10000", "model.ffn_hidden_size=1000000"]
    said = refusal(tiny.write(tmp_path, offline={**base["offline"], "overrides": large}))
    assert "7 cell(s) to run" in said
    assert "TB" in said
    assert "are free: make room, put output_dir on another disk" in said
