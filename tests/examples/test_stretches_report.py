"""The pictures of the stretches world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pear_megatron.pages.figures import write_png


def test_pictures_are_written_and_small(tmp_path: Path) -> None:
    from examples.stretches import plots

    rng = np.random.default_rng(0)
    weights = {"SFT": np.ones((3, 33)), "PEAR token": rng.uniform(0.1, 1.0, (3, 33))}
    careful = rng.random((3, 4)) < 0.5
    in_careful = np.pad(np.repeat(careful, 8, axis=1), ((0, 0), (0, 1)))
    for narrow in (False, True):
        over = plots.weights_over_positions(
            weights, careful, stretch_length=8, names=["x", "y", "z"], narrow=narrow
        )
        write_png(over, tmp_path / "a.png")
        write_png(plots.weight_distributions(weights, careful=in_careful, narrow=narrow), tmp_path / "b.png")
        for path in (tmp_path / "a.png", tmp_path / "b.png"):
            assert path.read_bytes()[:4] == b"\x89PNG"
            assert path.stat().st_size < 150_000
    with pytest.raises(ValueError, match="SFT is the same"):
        plots.weight_distributions({"SFT": np.ones(5)})
