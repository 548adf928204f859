"""`score --backend import --top-k K`: the likeliest tokens that vLLM and SGLang recorded, by id."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.files import Row
from pear_megatron.data.topk import TopK
from pear_megatron.score.rows import RowReader
from tests.score.jobs import run_job, write_jsonl

PROMPT, RESPONSE = [5, 6, 7], [11, 12, 13]
SAMPLED = [-0.5, -1.5, -4.0]
# At each token two others: the third token that was sampled is not among the two likeliest.
OTHERS = [{21: -1.5, 22: -3.0}, {11: -0.5, 23: -4.5}, {24: -0.5, 25: -1.5}]
LIKELIEST = [{11, 21}, {11, 12}, {24, 25, 13}]  # two each, and the one that was sampled


def engine_order(j: int) -> list[tuple[int, float]]:
    """What an engine asked for 2 has: the two likeliest, sorted, and the sampled one."""
    both = {RESPONSE[j]: SAMPLED[j]} | OTHERS[j]
    ordered = sorted(both.items(), key=lambda entry: -entry[1])
    return [(i, v) for rank, (i, v) in enumerate(ordered) if rank < 2 or i == RESPONSE[j]]


def vllm_dict(j: int) -> dict[str, Any]:
    entries = engine_order(j)
    return {str(i): {"logprob": v, "rank": r + 1, "decoded_token": "?"} for r, (i, v) in enumerate(entries)}


def vllm_offline() -> dict[str, Any]:
    output = {"index": 0, "text": "x", "token_ids": RESPONSE, "logprobs": [vllm_dict(j) for j in range(3)]}
    return {"prompt_token_ids": PROMPT, "outputs": [{**output, "finish_reason": "stop"}]}


def vllm_flat() -> dict[str, Any]:
    row, entries = vllm_offline(), [engine_order(j) for j in range(3)]
    ends = np.cumsum([len(one) for one in entries]).tolist()
    flat = [pair for one in entries for pair in one]
    row["outputs"][0]["logprobs"] = {
        "start_indices": [0, *ends[:-1]], "end_indices": ends,
        "token_ids": [i for i, _ in flat], "logprobs": [v for _, v in flat],
    }  # fmt: skip
    return row


def whole(**body: Any) -> dict[str, Any]:
    mask = [0] * len(PROMPT) + [1] * len(RESPONSE)
    return {"input_ids": PROMPT + RESPONSE, "loss_mask": mask, **body}


def vllm_prompt() -> dict[str, Any]:
    prompt = [None, *({str(i): {"logprob": -2.0}, "99": {"logprob": -0.3}} for i in PROMPT[1:])]
    return whole(
        response={"choices": [{"text": "y"}], "prompt_logprobs": [*prompt, *map(vllm_dict, range(3))]}
    )


def vllm_chat() -> dict[str, Any]:
    def entry(j: int) -> dict[str, Any]:
        # The server cuts the list at top_logprobs: the sampled token may be the one that falls off.
        top = [{"token": f"token_id:{i}", "logprob": v, "bytes": None} for i, v in engine_order(j)[:2]]
        return {"token": f"token_id:{RESPONSE[j]}", "logprob": SAMPLED[j], "top_logprobs": top}

    choice = {
        "message": {"role": "assistant", "content": "x"},
        "finish_reason": "stop",
        "token_ids": RESPONSE,
    }
    choice["logprobs"] = {"content": [entry(j) for j in range(3)]}
    return {"messages": [{"role": "user", "content": "q"}], "prompt_token_ids": PROMPT, "choices": [choice]}


def completion() -> dict[str, Any]:
    logprobs = {
        "tokens": [f"token_id:{i}" for i in RESPONSE],
        "token_logprobs": SAMPLED,
        "top_logprobs": [{f"token_id:{i}": v for i, v in engine_order(j)} for j in range(3)],
    }
    choice = {"text": "x", "logprobs": logprobs, "finish_reason": "stop", "prompt_token_ids": PROMPT}
    return {"prompt": "q", "choices": [choice]}


def sglang() -> dict[str, Any]:
    meta = {
        "id": "a", "finish_reason": {"type": "stop"}, "prompt_tokens": 3, "completion_tokens": 3,
        "input_token_logprobs": [[None, i, None] for i in PROMPT],
        "output_token_logprobs": [[v, i, None] for v, i in zip(SAMPLED, RESPONSE, strict=True)],
        "output_top_logprobs": [[[v, i, None] for i, v in engine_order(j)[:2]] for j in range(3)],
    }  # fmt: skip
    return {"prompt": "q", "text": "x", "output_ids": RESPONSE, "meta_info": meta}


def sglang_whole() -> dict[str, Any]:
    row = sglang()
    meta = row.pop("meta_info")
    given = [[None, PROMPT[0], None], *([-1.0, i, None] for i in PROMPT[1:])]
    meta |= {
        "prompt_tokens": 6,
        "input_token_logprobs": given + meta.pop("output_token_logprobs"),
        "input_top_logprobs": [None, None, [[-0.1, 50, None]], *meta.pop("output_top_logprobs")],
    }
    return whole(meta_info=meta)


FORMS = [vllm_offline, vllm_flat, vllm_prompt, vllm_chat, completion, sglang, sglang_whole]


def read(row: dict[str, Any], top_k: int = 2) -> TopK | None:
    plain = json.loads(json.dumps(row))
    (found,) = RowReader("import", Counter(), top_k=top_k)(Row("in.jsonl:1", plain, 1))
    assert found.trajectory.input_ids.tolist() == PROMPT + RESPONSE
    return found.trajectory.behavior_topk


def refuses(words: str, row: dict[str, Any], top_k: int = 2) -> None:
    with pytest.raises(RowProblem, match=words):
        read(row, top_k)


@pytest.mark.parametrize("form", FORMS)
def test_the_likeliest_and_the_sampled_token_are_read_by_id(form: Any) -> None:
    topk = read(form())
    assert topk is not None
    ids, logprobs = topk.padded(3)
    for j, (i, v) in enumerate(zip(ids, logprobs, strict=True)):
        assert set(i[i >= 0].tolist()) == LIKELIEST[j]
        expected = {RESPONSE[j]: SAMPLED[j]} | OTHERS[j]
        assert {a: float(b) for a, b in zip(i, v, strict=True) if a >= 0}.items() <= expected.items()
    assert read(form(), top_k=0) is None


@pytest.mark.parametrize("form", FORMS)
def test_fewer_than_were_asked_for_is_refused_with_what_to_ask(form: Any) -> None:
    refuses(r"--top-k asks for 4: ask the engine for .*top_logprobs_num=K \(SGLang\)", form(), top_k=4)


def test_tokens_by_their_text_are_refused() -> None:
    chat, text = vllm_chat(), completion()
    chat["choices"][0]["logprobs"]["content"][1]["top_logprobs"][0]["token"] = " the"
    text["choices"][0]["logprobs"]["top_logprobs"][1] = {" the": -0.5, " a": -1.5}
    for row in (chat, text):
        refuses(r"token 1: top_logprobs names the token ' the' by its text.*token_ids=true", row)


def test_an_answer_without_a_top_k_is_refused_only_where_one_is_wanted() -> None:
    row = sglang()
    del row["meta_info"]["output_top_logprobs"]
    assert read(row, top_k=0) is None
    refuses(r"meta_info\.output_top_logprobs is None; ask for .*top_logprobs_num=K", row)
    plain = whole(behavior_logprobs=[None] * 3 + SAMPLED)
    refuses("the row has no recorded top-k: ask the engine", plain)


def test_a_token_without_probability_is_no_entry_and_another_sampled_log_prob_is_refused() -> None:
    row = vllm_offline()
    row["outputs"][0]["logprobs"][0] = {"11": {"logprob": -0.5}, "30": {"logprob": -9999.0}}
    topk = read(row)
    assert topk is not None
    assert topk.counts.tolist() == [1, 2, 3]
    chat = vllm_chat()
    chat["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = -0.6
    refuses(r"behavior_logprobs\[3\] = -0\.5, but the sampled token's entry .* is -0\.6", chat)


def test_the_row_of_the_page_is_taken() -> None:
    page = (Path(__file__).parents[2] / "docs" / "score.md").read_text()
    (line,) = re.findall(r"^\{.*\}$", page, flags=re.MULTILINE)
    (found,) = RowReader("import", Counter(), top_k=2)(Row("in.jsonl:1", json.loads(line), 1))
    assert found.trajectory.behavior_topk is not None
    assert found.trajectory.behavior_topk.ids.tolist() == [21, 11]


def test_the_written_file_has_them(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", [vllm_offline(), sglang(), sglang_whole()])
    run_job(data, tmp_path / "out.parquet", None, backend="import", top_k=2)
    for row in pq.read_table(tmp_path / "out.parquet").to_pylist():
        assert [set(ids) for ids in row["behavior_topk_ids"]] == [set()] * 3 + LIKELIEST
