"""Conversations through `score` and into training: each turn has the log-probs that it was sampled with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pear_megatron import PearConfig, pear_loss
from pear_megatron.data import DataError, collate
from pear_megatron.errors import ScoreError
from tests.byte_tokenizer import make_byte_tokenizer
from tests.score.jobs import opened, run_job, score_rows, write_jsonl
from tests.score.tiny import save_tiny_llama

Row = dict[str, Any]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with Qwen3's own chat template, as TRL ships it."""
    trl = pytest.importorskip("trl")
    folder = save_tiny_llama(tmp_path_factory.mktemp("models") / "thinker", max_position_embeddings=512)
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    make_byte_tokenizer(template).save_pretrained(folder)
    return folder


class Sampler:
    """Samples printable characters from the model at temperature 1, and records the log-prob of every token."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._letters = self.tokenizer("".join(map(chr, range(97, 123))))["input_ids"]
        torch.manual_seed(1)

    def turn(self, messages: list[Row]) -> tuple[list[int], list[int], list[float], str]:
        """(ids of the context, ids of the answer, their log-probs, the answer without its end)."""
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        context = list(rendered["input_ids"])
        forms = ["<think>\n", 5, "\n</think>\n\n", 4, "<|im_end|>"]
        ids = list(context)
        logprobs = []
        for token in self._tokens(forms):
            with torch.no_grad():
                of_next = self._model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            if token is None:
                drawn = torch.multinomial(of_next[self._letters].exp(), 1)
                token = self._letters[int(drawn)]
            ids.append(token)
            logprobs.append(float(of_next[token]))
        answer = ids[len(context) :]
        return context, answer, logprobs, self.tokenizer.decode(answer[:-1])

    def _tokens(self, forms: list[str | int]) -> Iterator[int | None]:
        for form in forms:
            yield from [None] * form if isinstance(form, int) else self.tokenizer(form)["input_ids"]


def test_a_thinking_conversation_has_the_log_probs_that_its_turns_were_sampled_with(
    thinker: Path, tmp_path: Path
) -> None:
    sampler = Sampler(thinker)
    messages: list[Row] = []
    sampled = []
    for question in ("2+2?", "3+3?"):
        messages.append({"role": "user", "content": question})
        context, answer, logprobs, text = sampler.turn(messages)
        messages.append({"role": "assistant", "content": text})
        sampled.append((context, answer, logprobs))
    assert b"<think>" not in sampler.tokenizer.decode(sampled[1][0]).encode()  # of the first turn: stripped

    rows = score_rows(tmp_path, [{"id": "m", "messages": messages, "reward": -0.5}], thinker)
    assert [row["id"] for row in rows] == ["m#0", "m#1"]
    for row, (context, answer, logprobs) in zip(rows, sampled, strict=True):
        assert row["input_ids"] == context + answer
        assert row["loss_mask"] == [False] * len(context) + [True] * len(answer)
        np.testing.assert_allclose(row["behavior_logprobs"][len(context) :], logprobs, atol=1e-5)
        assert row["reward"] == -0.5
        assert json.loads(row["metadata"])["messages"] == messages

    dataset = opened(tmp_path / "out.parquet", seq_length=512, tokenizer=str(thinker))
    for i in range(2):
        batch = collate(dataset, [[i]], 512)
        with torch.no_grad():
            logits = sampler._model(batch.tokens).logits
        _, count, report = pear_loss(
            logits, batch.labels, batch.behavior_logprobs, batch.loss_mask, batch.cu_seqlens, PearConfig()
        )
        total, decisions = report["pear/log_ratio"].tolist()
        assert decisions == int(count) == len(sampled[i][1])
        assert abs(total / decisions) < 1e-6
        lp = logits[0].log_softmax(-1).gather(1, batch.labels[0].clamp_min(0)[:, None])[:, 0]
        ratio = (lp - batch.behavior_logprobs[0])[batch.loss_mask[0]]
        assert float(ratio.abs().max()) < 1e-5


def two_turns(**fields: Any) -> Row:
    return {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4"},
            {"role": "user", "content": "3+3?"},
            {"role": "assistant", "content": "<think>\nadd\n</think>\n\n6"},
        ],
        **fields,
    }


def test_what_was_split_is_said(thinker: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pear_megatron")
    rows = score_rows(tmp_path, [two_turns(), two_turns()], thinker)
    tokens = sum(len(row["input_ids"]) for row in rows)
    whole = sum(len(row["input_ids"]) for row in rows[1::2])
    assert (
        f"2 rows were split into 4 trajectories, one per assistant turn: {tokens} tokens instead of {whole}"
        in (caplog.text)
    )


def test_policy_logprobs_stand_beside_those_of_each_turn(thinker: Path, tmp_path: Path) -> None:
    score_rows(tmp_path, [two_turns(id="m")], thinker)
    run_job(tmp_path / "out.parquet", tmp_path / "both.parquet", thinker, write_as="policy")
    rows = pq.read_table(tmp_path / "both.parquet").to_pylist()
    assert [row["id"] for row in rows] == ["m#0", "m#1"]
    for row in rows:
        np.testing.assert_allclose(row["policy_logprobs"], row["behavior_logprobs"], atol=1e-6)


def test_one_list_of_log_probs_for_turns_that_are_split_is_refused_or_replaced(
    thinker: Path, tmp_path: Path
) -> None:
    row = two_turns(behavior_logprobs=[-0.5] * 100)
    data = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: behavior_logprobs is one list.* 2 trajectories \(--multi-turn\)"
    ):
        run_job(data, tmp_path / "policy.parquet", thinker, write_as="policy")
    assert len(score_rows(tmp_path, [row], thinker)) == 2


def test_template_arguments_and_multi_turn_shape_the_rows_and_the_identity(
    thinker: Path, tmp_path: Path
) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text(make_byte_tokenizer().chat_template)
    data = write_jsonl(tmp_path / "a.jsonl", [two_turns()])

    def scored(name: str, **options: Any) -> list[Row]:
        run_job(data, tmp_path / name, thinker, **options)
        return pq.read_table(tmp_path / name).to_pylist()

    plain = scored("plain.parquet", chat_template=str(template))
    assert len(plain) == 1  # this template forgets nothing
    split = scored("split.parquet", chat_template=str(template), multi_turn="split")
    assert len(split) == 2
    assert split[0]["tokenizer_hash"] == plain[0]["tokenizer_hash"]
    data = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "2+2?", "response": "4"}])
    silent = scored("silent.parquet", chat_template_kwargs={"enable_thinking": False})
    own = scored("own.parquet")
    assert len({rows[0]["tokenizer_hash"] for rows in (plain, silent, own)}) == 3
    for options in ({}, {"multi_turn": "split"}, {"chat_template_kwargs": {"enable_thinking": True}}):
        with pytest.raises(ScoreError, match="belongs to another command"):
            run_job(tmp_path / "a.jsonl", tmp_path / "plain.parquet", thinker, **options)

    options = {"seq_length": 512, "tokenizer": str(thinker)}
    with pytest.raises(DataError, match="foreign tokenizer, chat_template or chat_template_kwargs"):
        opened(tmp_path / "plain.parquet", **options)
    assert len(opened(tmp_path / "plain.parquet", **options, chat_template=str(template))) == 1


def test_token_weights_go_along(thinker: Path, tmp_path: Path) -> None:
    ids = {"input_ids": [1, 2, 3, 4], "loss_mask": [0, 1, 1, 1]}
    rows = score_rows(tmp_path, [ids, {**ids, "token_weights": [None, 0.5, -2, 0]}], thinker)
    assert [row["token_weights"] for row in rows] == [None, [0.0, 0.5, -2.0, 0.0]]


def test_text_fields_are_remembered(thinker: Path, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "get", "parameters": {}}}]
    kwargs = {"enable_thinking": True}
    row = {"prompt": "a", "response": "b", "tools": tools, "chat_template_kwargs": kwargs}
    (scored,) = score_rows(tmp_path, [row], thinker)
    metadata = json.loads(scored["metadata"])
    assert {name: metadata[name] for name in row} == row
    assert '"get"' in make_byte_tokenizer().decode(scored["input_ids"])


def test_many_rows_with_one_problem_are_one_line(thinker: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": ""}] * 40
    with pytest.raises(DataError) as caught:
        score_rows(tmp_path, rows, thinker)
    (line,) = caught.value.problems
    assert "(40 rows like this: " in line
    assert caught.value.total == 40
