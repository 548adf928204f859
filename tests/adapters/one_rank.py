"""What another stack's trainer should come to: the one-rank loss on Hugging Face's model, trained by torch's AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pear_megatron import PearConfig
from pear_megatron.data import BatchPlan, DataConfig, TrajectoryDataset, collate, prepare
from pear_megatron.loss import pear_loss


@cache
def expected(
    folder: Path,
    pear: PearConfig,
    *,
    seq_length: int,
    learning_rate: float,
    batch: int = 1,
    steps: int = 0,
    seed: int = 0,
    multiple: int = 1,
    batches: tuple[tuple[int, ...], ...] = (),
    betas: tuple[float, float] = (0.9, 0.95),
    attention: bool = True,
) -> tuple[list[dict[str, float]], Any]:
    """Of every step: loss, gradient norm and report; and the model, which was folder/model, on folder/data.jsonl.

    Steps take ``batches`` of trajectories, or ``steps`` of our plan's of ``batch`` rows.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager"
    )
    if not attention:
        for layer in model.model.layers:
            layer.self_attn.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=betas, weight_decay=0.0)
    rows = trajectories(folder / "data.jsonl", model.config.vocab_size, seq_length)
    plan = BatchPlan(rows.lengths, seq_length, batch, seed=seed, multiple=multiple)
    found = []
    for own in batches or [[i for row in plan.rows(step)[1] for i in row] for step in range(steps)]:
        loss, decisions, report = loss_of(model, rows, own, pear)
        optimizer.zero_grad()
        (loss / decisions).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append({"grad_norm": float(norm), **means(report)})
    return found, model


def trajectories(file: Path, vocab_size: int, seq_length: int) -> TrajectoryDataset:
    return TrajectoryDataset.open(
        prepare(DataConfig(train=[str(file)], seq_length=seq_length), vocab_size=vocab_size)
    )


def loss_of(model: Any, rows: TrajectoryDataset, own: Sequence[int], pear: PearConfig) -> Any:
    """Of the trajectories ``own``: pear_loss's three."""
    batch = collate(rows, [own], int(sum(rows.lengths[i] - 1 for i in own)))
    logits = [model(torch.as_tensor(rows[i].input_ids[:-1].astype("int64"))[None]).logits[0] for i in own]
    return pear_loss(
        torch.cat(logits), batch.labels.flatten(), batch.behavior_logprobs.flatten(), batch.loss_mask.flatten(),
        batch.cu_seqlens, pear, reward=batch.reward,
    )  # fmt: skip


def means(report: dict[str, torch.Tensor]) -> dict[str, float]:
    return {key: float(total / count) for key, (total, count) in report.items()}


def assert_same(steps: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    assert len(steps) == len(wanted)
    for step, want in zip(steps, wanted, strict=True):
        assert {name: step[name] for name in want} == pytest.approx(want, rel=1e-5, abs=1e-6)
