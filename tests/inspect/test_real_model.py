"""A real model on real text: its own log-probs pass, and moved by a token or two inspect and training refuse them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import run_ranks
from tests.megatron.runs import REPOSITORY
from tests.structured import write_rows

pytestmark = pytest.mark.slow
TOKENS, ROWS, PROMPT = 64, 8, 8


def rank_inspect(rank: int, model: Path, jobs: list[tuple[Path, Path]]) -> list[str]:
    from megatron.core import parallel_state

    from pear_megatron.data import DataError
    from pear_megatron.inspect.run import run
    from pear_megatron.inspect.settings import read_settings
    from tests.megatron.ranks import be_quiet

    be_quiet()
    said = []
    for data, output in jobs:
        settings = read_settings(
            [str(data)], [], recipe=None, model=str(model), tokenizer=None, seq_length=TOKENS, text={}
        )
        try:
            run(settings, model=str(model), scored=False, output=output, max_trajectories=99, seed=0)
            said.append("")
        except DataError as error:
            said.append(str(error))
        finally:
            parallel_state.destroy_model_parallel()  # the process group is the test's
    return said


def rank_train(rank: int, model: Path, data: list[Path], folder: Path) -> list[bool | str]:
    from megatron.core import parallel_state

    from pear_megatron.errors import PearError
    from pear_megatron.megatron.layout import initialize
    from pear_megatron.recipe import load_recipe
    from pear_megatron.train.trainer import Trainer
    from tests.megatron.ranks import be_quiet

    be_quiet()
    outcomes: list[bool | str] = []
    for i, file in enumerate(data):
        recipe = load_recipe(
            REPOSITORY / "recipes" / "sft" / "base.yaml",
            [f"output_dir={folder / str(i)}", f"+model.hf={model}", f"+data.train={file}",
             f"data.seq_length={TOKENS}", "train.precision=fp32", f"train.global_batch_size={ROWS}",
             "+train.max_steps=1"],
        )  # fmt: skip
        layout = initialize(recipe.model, recipe.parallel, recipe.train)
        trainer = Trainer(recipe, layout)
        trainer.saver.save = lambda *_, **__: None  # type: ignore[method-assign]  # half a gigabyte nobody reads
        try:
            outcomes.append(trainer.train())
        except PearError as error:
            outcomes.append(str(error))
        finally:
            parallel_state.destroy_model_parallel()
    return outcomes


def rank_score(rank: int, model: Path, ids: list[list[int]]) -> list[np.ndarray]:
    from pear_megatron.data import Trajectory
    from pear_megatron.inspect.sample import score
    from tests.megatron.ranks import be_quiet

    be_quiet()
    mask = np.arange(TOKENS) >= PROMPT
    nothing = np.zeros(TOKENS, dtype=np.float32)
    rows = [Trajectory(f"t{i}", np.array(row, dtype=np.int32), mask, nothing) for i, row in enumerate(ids)]
    return score(str(model), rows, dtype="fp32")


@pytest.fixture(scope="module")
def data(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Per shift a file of the licence's text with SmolLM2's own log-probs, that much too late."""
    from pear_megatron.data import load_tokenizer, tokenizer_hash

    tokenizer = load_tokenizer(str(smollm2))
    text = (REPOSITORY / "LICENSE").read_text()
    tokens = tokenizer(text)["input_ids"]
    ids = [tokens[i * TOKENS : (i + 1) * TOKENS] for i in range(ROWS)]
    logprobs = run_ranks(1, rank_score, smollm2, ids)[0]
    folder, files = tmp_path_factory.mktemp("real"), {}
    for shift in (0, 1, 2):
        rows: list[dict[str, Any]] = []
        for i, (row, true) in enumerate(zip(ids, logprobs, strict=True)):
            moved = [0.0] * shift + true.tolist()[: TOKENS - shift]
            behavior = [None] * PROMPT + moved[PROMPT:]
            mask = [0] * PROMPT + [1] * (TOKENS - PROMPT)
            rows.append({"id": f"licence-{i}", "input_ids": row, "loss_mask": mask,
                         "behavior_logprobs": behavior, "tokenizer_hash": tokenizer_hash(tokenizer)})  # fmt: skip
        files[shift] = write_rows(folder / f"shift{shift}.jsonl", rows)
    return files


def test_inspect_refuses_them_shifted_and_passes_the_models_own(
    tmp_path: Path, smollm2: Path, data: dict[int, Path]
) -> None:
    jobs = [(file, tmp_path / f"{shift}.html") for shift, file in data.items()]
    said = run_ranks(1, rank_inspect, smollm2, jobs, timeout=600)[0]
    assert said[0] == ""
    assert "1 token after the ones they belong to" in said[1]
    assert "2 tokens after the ones they belong to" in said[2]
    own = json.loads((tmp_path / "0.json").read_text())
    assert own["alignment"]["correlations"]["0"] == pytest.approx(1, abs=1e-4)
    assert "on-policy data" in [verdict["title"] for verdict in own["verdicts"]]
    assert own["statistics"]["all"]["weight"] == pytest.approx(
        np.mean([0.999**k for k in range(TOKENS - PROMPT)]), rel=1e-3
    )
    page = re.sub(r"<[^>]*>", "", (tmp_path / "0.html").read_text())
    assert "shall mean the union of the acting entity" in page  # the text itself, by the model's tokenizer


def test_training_refuses_them_shifted_and_passes_the_models_own(
    tmp_path: Path, smollm2: Path, data: dict[int, Path]
) -> None:
    files = [data[shift] for shift in (1, 2, 0)]
    outcomes = run_ranks(1, rank_train, smollm2, files, tmp_path, timeout=600)[0]
    assert "1 token after the ones they belong to" in str(outcomes[0])
    assert "licence-" in str(outcomes[0])
    assert "2 tokens after the ones they belong to" in str(outcomes[1])
    assert outcomes[2] is True
    logged = json.loads((tmp_path / "2" / "metrics.jsonl").read_text())
    assert math.isclose(logged["pear/log_ratio"], 0, abs_tol=1e-4)
