"""The puzzle data: sampled log-probs are the model's own, rows are valid, interrupted equals uninterrupted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("reasoning_gym", reason="needs reasoning-gym")

from examples.puzzles import make_data as script
from examples.puzzles.puzzles import make_puzzles
from examples.puzzles.sample import find_model, load_model, sample_batch

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPTIONS = ("--num-puzzles", "10", "--batch-size", "4", "--max-new-tokens", "150", "--seed", "3")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random Llama over bytes, with a ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=2048, initializer_range=0.2, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _run(model: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    script.main(["--model", str(model), "--out", str(out), *OPTIONS, *options])
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished file of the tiny model."""
    out = tmp_path_factory.mktemp("made") / "rows.jsonl"
    _run(tiny_model, out)
    return out


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _largest_difference(model: Any, rows: list[dict[str, Any]]) -> float:
    """Of the recorded log-probs from one teacher-forced pass over each whole sequence, without padding."""
    worst = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, :-1].float()
        expected = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        decisions = torch.tensor(row["loss_mask"][1:], dtype=torch.bool)
        recorded = torch.tensor(row["behavior_logprobs"][1:])
        worst = max(worst, (recorded - expected)[decisions].abs().max().item())
    return worst


def test_recorded_logprobs_are_those_of_one_pass_over_the_sequence(tiny_model: Path, made: Path) -> None:
    assert _largest_difference(load_model(tiny_model), _rows(made)) < 1e-4


def test_sampling_follows_the_models_distribution_without_top_k_or_top_p(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    prompt = list(range(40))
    samples = sample_batch(model, [prompt] * 4000, list(range(4000)), end_id=257, max_new_tokens=1)
    with torch.inference_mode():
        probabilities = model(input_ids=torch.tensor([prompt])).logits[0, -1].float().softmax(-1)
    counts = torch.bincount(torch.tensor([s.token_ids[0] for s in samples]), minlength=258)
    rare = probabilities < 1 / 258
    # Tokens that top-k or top-p would cut are drawn as often as they should be.
    assert counts[rare].sum() / 4000 == pytest.approx(probabilities[rare].sum().item(), abs=0.03)
    error = (counts / 4000 - probabilities).abs() / (probabilities / 4000).sqrt()
    assert error.max() < 5


def test_rows_have_the_response_as_decisions_up_to_the_end_of_turn(made: Path) -> None:
    rows = _rows(made)
    assert {row["truncated"] for row in rows} == {True, False}
    for row in rows:
        assert len(row["input_ids"]) == len(row["loss_mask"]) == len(row["behavior_logprobs"])
        first = row["loss_mask"].index(1)
        assert row["loss_mask"] == [0] * first + [1] * (len(row["loss_mask"]) - first)
        assert row["behavior_logprobs"][:first] == [0.0] * first
        assert max(row["behavior_logprobs"]) <= 0.0
        response = row["input_ids"][first:]
        assert 257 not in response[:-1]
        assert (response[-1] != 257) == row["truncated"]
        assert row["truncated"] == (len(response) == 150 and response[-1] != 257)
        assert row["temperature"] == 1.0
        assert row["reward"] == float(row["metadata"]["score"] == 1.0)


def test_the_loader_takes_the_rows_and_drops_truncated_ones(
    tiny_model: Path, made: Path, tmp_path: Path
) -> None:
    from pear_megatron.data import DataConfig, TrajectoryDataset, prepare

    config = DataConfig(
        train=[str(made)], tokenizer=str(tiny_model), seq_length=2048, cache_dir=str(tmp_path / "cache")
    )
    dataset = TrajectoryDataset.open(prepare(config))
    assert len(dataset) == sum(not row["truncated"] for row in _rows(made))


def test_interrupted_and_continued_equals_uninterrupted(tiny_model: Path, made: Path, tmp_path: Path) -> None:
    again = tmp_path / "rows.jsonl"
    lines = made.read_text().splitlines(keepends=True)
    partial = tmp_path / "rows.jsonl.partial"
    partial.write_text("".join(lines[:6]) + lines[6][:40])  # a whole batch, half of the next, a torn line
    _run(tiny_model, again)
    assert again.read_bytes() == made.read_bytes()
    assert not partial.exists()


def test_a_partial_file_of_other_options_is_refused(tiny_model: Path, made: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.partial").write_text(made.read_text())
    with pytest.raises(SystemExit, match="begun with other options"):
        _run(tiny_model, tmp_path / "rows.jsonl", "--wrong-reward", "-0.1")


def test_a_finished_file_is_not_overwritten(
    tiny_model: Path, made: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        script.main(["--model", str(tiny_model), "--out", str(made), *OPTIONS])
    assert "is there already" in capsys.readouterr().err


def test_the_wrong_reward_goes_to_wrong_answers(tiny_model: Path, tmp_path: Path) -> None:
    rows = _run(tiny_model, tmp_path / "rows.jsonl", "--wrong-reward", "-0.1", "--num-puzzles", "4")
    wrong = [row for row in rows if row["metadata"]["score"] < 1.0]
    assert wrong
    assert {row["reward"] for row in wrong} == {-0.1}


def test_the_grader_reads_the_last_number() -> None:
    for puzzle in make_puzzles(24, seed=0):
        answer = int(puzzle.answer)
        assert puzzle.grade(f"The answer is {answer}.") == 1.0
        assert puzzle.grade(f"1 + 2 is {answer}") == 1.0
        assert puzzle.grade(f"The answer is {answer + 7}.") < 1.0
        assert puzzle.grade("I do not know.") == 0.0


def test_puzzles_are_reproducible_and_do_not_repeat_their_solved_examples() -> None:
    first, again, other = make_puzzles(12, 0), make_puzzles(12, 0), make_puzzles(12, 1)
    assert [p.messages for p in first] == [p.messages for p in again]
    assert [p.messages for p in first] != [p.messages for p in other]
    assert len({p.id for p in first + other}) == 24
    assert {p.messages[-1]["role"] for p in first} == {"user"}


@pytest.mark.slow
def test_smollm2s_recorded_logprobs_are_those_of_one_pass(tmp_path: Path) -> None:
    if folder := os.environ.get("PEAR_SMOLLM2_DIR"):
        path = Path(folder)
    else:
        try:
            path = find_model()
        except FileNotFoundError as error:
            pytest.skip(str(error))
    settings = script.Settings(model=path, num_puzzles=4, batch_size=4, max_new_tokens=12)
    rows = script.make_data(tmp_path / "rows.jsonl", settings)
    assert len({len(row["input_ids"]) - sum(row["loss_mask"]) for row in rows}) > 1  # padding was needed
    assert _largest_difference(load_model(path), rows) < 1e-3
