"""What verl's adapter makes of log-probs, columns, files and settings; needs no verl."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from pear_megatron import PearConfig
from pear_megatron.adapters.verl import settings
from pear_megatron.adapters.verl.data import PearDataset
from pear_megatron.adapters.verl.loss import REPORT, PearSFTLoss, reduce_reports
from pear_megatron.data import DataError
from pear_megatron.errors import RecipeError
from pear_megatron.loss import pear_loss, report_keys
from tests.byte_tokenizer import save_byte_tokenizer

VOCABULARY = 13
LENGTHS = (7, 2, 11, 5, 9, 3)
REWARDS = (1.0, -0.5, 2.0, 1.0, 0.0, 1.0)


def jagged(parts: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def columns() -> list[dict[str, Tensor]]:
    """Trajectories of LENGTHS tokens as PearDataset gives them, and ``token_weights``."""
    random = torch.Generator().manual_seed(3)
    rows = []
    for n, reward in zip(LENGTHS, REWARDS, strict=True):
        mask = (torch.rand(n, generator=random) < 0.7).long()
        mask[0], mask[-1] = 0, 1
        rows.append({
            "input_ids": torch.randint(VOCABULARY, (n,), generator=random),
            "loss_mask": mask,
            "behavior_logprobs": -torch.rand(n, generator=random) * 4 * mask,
            "reward": torch.full((n,), reward),
            "token_weights": torch.rand(n, generator=random) * mask,
        })  # fmt: skip
    return rows


def logits() -> list[Tensor]:
    random = torch.Generator().manual_seed(4)
    return [torch.randn(n, VOCABULARY, generator=random) for n in LENGTHS]


def micro_batch(
    rows: list[dict[str, Tensor]], given: list[Tensor], *, dp_size: int = 1, without: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The log-probs and the batch that verl's engine gives a loss function; the last log-prob is of no token."""
    log_probs = [
        x.log_softmax(-1).gather(-1, row["input_ids"].roll(-1)[:, None])[:, 0]
        for x, row in zip(given, rows, strict=True)
    ]
    decisions = sum(int(row["loss_mask"].sum()) for row in columns())
    data = {name: jagged([row[name] for row in rows]) for name in rows[0] if name not in without}
    return {"log_probs": jagged(log_probs)}, {**data, "dp_size": dp_size, "batch_num_tokens": decisions}


def expected(
    config: PearConfig, given: list[Tensor], *, weighted: bool
) -> tuple[Tensor, dict[str, float], int]:
    """Loss, report and decisions of pear_loss on all trajectories at once."""
    rows = columns()

    def following(name: str) -> Tensor:
        return torch.cat([row[name][1:] for row in rows])

    loss, decisions, report = pear_loss(
        torch.cat([x[:-1] for x in given]),
        following("input_ids"),
        following("behavior_logprobs"),
        following("loss_mask").bool(),
        torch.tensor([0, *(n - 1 for n in LENGTHS)]).cumsum(0),
        config,
        reward=torch.tensor(REWARDS),
        token_weights=following("token_weights") if weighted else None,
    )
    means = {key: float(total / count) for key, (total, count) in report.items()}
    return loss / decisions, means, int(decisions)


CONFIGS = {
    "token": PearConfig(log_ratio_clip=(-0.5, 0.5)),
    "block": PearConfig(variant="block", block_size=3, negative_scale=0.5),
    "normalized": PearConfig(normalize="sequence", baseline="sequence_mean"),
    "sequence": PearConfig(variant="sequence"),
    "none": PearConfig(variant="none"),
    "stopped": PearConfig(dft_power=1.0, negative_floor=0.1),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_micro_batches_on_two_ranks_are_the_loss_of_the_whole(name: str, weighted: bool) -> None:
    config, rows = CONFIGS[name], columns()
    whole = [x.requires_grad_() for x in logits()]
    loss, means, decisions = expected(config, whole, weighted=weighted)
    loss.backward()

    parts, total, gathered = [x.requires_grad_() for x in logits()], torch.zeros(()), []
    without = () if weighted else ("token_weights",)
    # As verl does: sum over a rank's micro-batches, mean over the ranks; reports gathered rank by rank.
    for rank in ([0, 1, 2], [3, 4, 5]):
        reports: list[float] = []
        for micro in (rank[:1], rank[1:]):
            batch = micro_batch(
                [rows[i] for i in micro], [parts[i] for i in micro], dp_size=2, without=without
            )
            part, metrics = PearSFTLoss(config)(*batch)
            (part / 2).backward()
            total += part.detach() / 2
            reports += metrics[REPORT]
        gathered.append(reports)
    torch.testing.assert_close(total, loss.detach())
    for got, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(got.grad, want.grad)
    reduced = reduce_reports(gathered, report_keys(config))
    assert reduced == pytest.approx({**means, "decisions": decisions}, rel=1e-5, abs=1e-6)


def test_reports_come_nested_as_the_ranks_gather_them() -> None:
    rows, given = columns(), logits()
    one = PearSFTLoss(PearConfig())(*micro_batch(rows[:2], given[:2]))[1][REPORT]
    other = PearSFTLoss(PearConfig())(*micro_batch(rows[2:], given[2:]))[1][REPORT]
    flat = reduce_reports(one + other)
    assert flat["decisions"] == sum(int(row["loss_mask"].sum()) for row in rows)
    for gathered in ([one, other], [[one], [other]], [[one, other]]):
        assert reduce_reports(gathered) == flat


def test_a_report_of_nothing_is_zeros() -> None:
    row = columns()[0]
    row["loss_mask"] = torch.zeros_like(row["loss_mask"])
    loss, metrics = PearSFTLoss(PearConfig())(*micro_batch([row], logits()[:1]))
    assert float(loss) == 0
    assert set(reduce_reports(metrics[REPORT]).values()) == {0.0}


def test_the_log_prob_of_no_token_does_not_enter() -> None:
    outputs, data = micro_batch(columns(), logits())
    loss = PearSFTLoss(PearConfig())(outputs, data)[0]
    spoilt = [torch.cat([x[:-1], torch.tensor([float("nan")])]) for x in outputs["log_probs"].unbind()]
    torch.testing.assert_close(PearSFTLoss(PearConfig())({"log_probs": jagged(spoilt)}, data)[0], loss)


def marked_first(row: dict[str, Tensor]) -> None:
    row["loss_mask"][0] = 1


def shorter(row: dict[str, Tensor]) -> None:
    row["reward"] = row["reward"][1:]


@pytest.mark.parametrize(
    ("spoil", "without", "said"),
    [
        (marked_first, (), "marks the first token of a trajectory"),
        (shorter, (), r"reward has \d+ entries for 37 tokens"),
        (None, ("behavior_logprobs",), "the batch has no behavior_logprobs: data.custom_cls must be"),
        (None, ("loss_mask",), "the batch has no loss_mask"),
    ],
)
def test_columns_that_do_not_fit_are_named(
    spoil: Callable[[dict[str, Tensor]], None] | None, without: tuple[str, ...], said: str
) -> None:
    rows = columns()
    if spoil is not None:
        spoil(rows[2])
    with pytest.raises(DataError, match=said):
        PearSFTLoss(PearConfig())(*micro_batch(rows, logits(), without=without))


def test_plain_sft_needs_no_logprobs() -> None:
    batch = micro_batch(columns(), logits(), without=("behavior_logprobs", "reward", "token_weights"))
    loss = PearSFTLoss(PearConfig(variant="none"))(*batch)[0]
    nll = -sum(
        (x[:-1] * row["loss_mask"][1:]).sum()
        for x, row in zip(batch[0]["log_probs"].unbind(), columns(), strict=True)
    )
    torch.testing.assert_close(loss, nll / batch[1]["batch_num_tokens"])


def test_log_probs_that_are_rounded_or_padded_are_refused() -> None:
    outputs, data = micro_batch(columns(), logits())
    with pytest.raises(RecipeError, match="bfloat16, whose rounding .* install flash-attn"):
        PearSFTLoss(PearConfig())({"log_probs": outputs["log_probs"].bfloat16()}, data)
    with pytest.raises(RecipeError, match="pad_mode=no_padding"):
        PearSFTLoss(PearConfig())({"log_probs": torch.zeros(6, 11)}, data)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Five rows of ids; the third has token_weights."""
    with (tmp_path / "rows.jsonl").open("w") as file:
        for i, n in enumerate((4, 6, 5, 12, 3)):
            mask = [0] + [1] * (n - 1)
            row = {"id": f"row-{i}", "input_ids": list(range(n)), "loss_mask": mask, "reward": 1.0 + i,
                   "behavior_logprobs": [-0.5 * m for m in mask]}  # fmt: skip
            file.write(
                json.dumps(row | ({"token_weights": [0.25 * m for m in mask]} if i == 2 else {})) + "\n"
            )
    return tmp_path / "rows.jsonl"


def dataset(files: Path, *, max_samples: int = -1, **data: Any) -> PearDataset:
    """As verl makes one, of its ``data`` section."""
    folder = files.parent / "tokenizer"
    if not folder.exists():
        save_byte_tokenizer(folder)
    tokenizer = type("Tokenizer", (), {"name_or_path": str(folder), "__len__": lambda self: 300})()
    usual = {"max_length": 12, "truncation": "error", "messages_key": "messages", "tools_key": "tools",
             "enable_thinking_default": "none", "apply_chat_template_kwargs": {}}  # fmt: skip
    config = OmegaConf.create({**usual, **data})
    return PearDataset(
        parquet_files=[str(files)], tokenizer=tokenizer, config=config, max_samples=max_samples
    )


def test_rows_are_aligned_with_their_tokens(files: Path) -> None:
    rows = dataset(files)
    assert len(rows) == 5
    for i, written in enumerate(map(json.loads, files.read_text().splitlines())):
        row, n = rows[i], len(written["input_ids"])
        assert row["input_ids"].tolist() == written["input_ids"]
        assert row["position_ids"].tolist() == list(range(n))
        assert row["loss_mask"].tolist() == written["loss_mask"]
        assert row["behavior_logprobs"].tolist() == written["behavior_logprobs"]
        assert row["reward"].tolist() == [written["reward"]] * n
        assert row["input_ids"].dtype == row["loss_mask"].dtype == torch.int64
        assert row["behavior_logprobs"].dtype == row["reward"].dtype == torch.float32


def test_token_weights_come_with_every_row_or_none(files: Path) -> None:
    rows = [dataset(files)[i] for i in range(5)]
    assert {len(row["token_weights"]) == len(row["input_ids"]) for row in rows} == {True}
    assert rows[2]["token_weights"].tolist() == [0.0, 0.25, 0.25, 0.25, 0.25]
    assert rows[0]["token_weights"][1:].tolist() == [1.0] * 3


def test_reference_log_probs_come_where_the_loss_takes_them(files: Path) -> None:
    assert "reference_logprobs" not in dataset(files)[0]
    with pytest.raises(DataError, match="missing field 'reference_logprobs'.*score --as reference"):
        dataset(files, pear={"reference_logprobs": "required"})
    rows = [json.loads(line) for line in files.read_text().splitlines()]
    written = [{**row, "reference_logprobs": [-0.75 * m for m in row["loss_mask"]]} for row in rows]
    files.write_text("".join(json.dumps(row) + "\n" for row in written))
    row = dataset(files, pear={"reference_logprobs": "required"})[1]
    assert row["reference_logprobs"].tolist() == written[1]["reference_logprobs"]
    with pytest.raises(
        RecipeError, match="data.pear.reference_logprobs=yes: it is one of no, if_there, required"
    ):
        dataset(files, pear={"reference_logprobs": "yes"})


def test_the_first_rows_can_be_asked_for(files: Path) -> None:
    assert len(dataset(files, max_samples=2)) == 2
    assert len(dataset(files, max_samples=99)) == 5


def test_max_length_counts_tokens(files: Path) -> None:
    with pytest.raises(DataError, match="over-long"):
        dataset(files, max_length=11)
    assert len(dataset(files, max_length=11, pear={"overlong": "drop"})) == 4


def test_rows_without_logprobs_train_plain_sft_alone(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}\n')
    assert len(dataset(tmp_path / "rows.jsonl", pear={"needs_logprobs": False})) == 1
    with pytest.raises(DataError, match="missing field 'behavior_logprobs'"):
        dataset(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"truncation": "right"}, r"data.truncation=right: .* a cut trajectory has lost its suffix"),
        ({"messages_key": "turns"}, "data.messages_key=turns"),
        ({"enable_thinking_default": True}, "apply_chat_template_kwargs.enable_thinking"),
        ({"pear": {"overlongs": "drop"}}, "data.pear has no overlongs; it has overlong, truncated"),
    ],
)
def test_settings_that_the_dataset_would_not_follow_are_refused(
    data: dict[str, Any], said: str, files: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        dataset(files, **data)


@pytest.mark.parametrize(
    ("changed", "engine", "said"),
    [
        ({}, {"strategy": "veomni"}, "engine=veomni: .* use megatron, fsdp, fsdp2"),
        ({"data.pad_mode": "right"}, {}, "data.pad_mode=right"),
        ({}, {"dynamic_context_parallel": True}, "use engine.context_parallel_size"),
        ({"model.custom_chat_template": "{{ x }}"}, {}, r"\+data.pear.chat_template=FILE"),
    ],
)
def test_settings_that_would_spoil_the_loss_are_refused(
    changed: dict[str, Any], engine: dict[str, Any], said: str
) -> None:
    config = OmegaConf.create(
        {"data": {"pad_mode": "no_padding", "pear": {}}, "model": {"custom_chat_template": None}}
    )
    settings.check_settings(config, SimpleNamespace(strategy="megatron"))
    for key, value in changed.items():
        OmegaConf.update(config, key, value)
    with pytest.raises(RecipeError, match=said):
        settings.check_settings(config, SimpleNamespace(**{"strategy": "megatron", **engine}))


def test_a_batch_that_verl_would_round_down_is_refused() -> None:
    settings.check_batches(12, 4)
    with pytest.raises(RecipeError, match="train_batch_size=10 does not divide among 4"):
        settings.check_batches(10, 4)


def test_a_padded_vocabulary_is_refused() -> None:
    hf_config = SimpleNamespace(vocab_size=1000)
    wrapped = SimpleNamespace(module=SimpleNamespace(vocab_size=1024))
    with pytest.raises(RecipeError, match="1024 columns for 1000 tokens"):
        settings.check_vocabulary(SimpleNamespace(module=[wrapped]), hf_config)
    settings.check_vocabulary(SimpleNamespace(module=[SimpleNamespace(vocab_size=1000)]), hf_config)
    settings.check_vocabulary(SimpleNamespace(module=object()), hf_config)  # FSDP: no padding


@pytest.mark.parametrize(
    ("per_token", "cp_size", "experts", "counted"),
    [(True, 2, None, 14), (False, 2, None, 7), (True, 1, None, 7), (True, 2, 4, 7)],
)
def test_tokens_are_counted_whole_where_verl_divides_them(
    per_token: bool, cp_size: int, experts: int | None, counted: int
) -> None:
    engine = SimpleNamespace(
        tf_config=SimpleNamespace(calculate_per_token_loss=per_token, num_moe_experts=experts),
        engine_config=SimpleNamespace(context_parallel_size=cp_size),
        _routed_num_tokens=lambda data: 7,
    )
    settings.count_whole_tokens(engine)
    assert engine._routed_num_tokens(None) == counted
