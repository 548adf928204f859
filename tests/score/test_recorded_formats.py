"""What else each generator writes: several answers, tool calls, reasoning, other shapes of the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_megatron.data.errors import Problems, RowProblem
from pear_megatron.data.files import read_rows
from pear_megatron.score.recorded.stream import joined
from pear_megatron.score.recorded.tokens import Tokens
from tests.score.recorded_cases import (
    LOGPROBS,
    MESSAGES,
    RESPONSE,
    TEXT,
    case,
    check_tokens,
    prompt_ids,
    read,
    refuses,
    tokenizer,
)

TOOLS = [{"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": {}}}]


def answer_of(text: str, **message: Any) -> dict[str, Any]:
    """vLLM's chat answer that was sampled as ``text``: its tokens as texts, without ids."""
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    content = [{"token": tokenizer().decode([i]), "logprob": -0.5} for i in ids]
    choice = {
        "message": {"role": "assistant", **message},
        "logprobs": {"content": content},
        "finish_reason": "stop",
    }
    return {"messages": MESSAGES, "response": {"choices": [choice]}}


def test_sglang_answer_may_be_the_row_itself() -> None:
    row = case("sglang")
    (found,) = read({**row.pop("response"), **row})
    check_tokens(found)


def test_sglang_prompt_comes_from_the_request_where_the_answer_has_only_its_end() -> None:
    row = case("sglang")
    meta = row["response"]["meta_info"]
    meta["input_token_logprobs"] = meta["input_token_logprobs"][-1:]
    refuses(r"meta_info\.prompt_tokens = 36, but this row has 1", row)
    for request in (
        {"request": {"input_ids": prompt_ids()}},
        {"input_ids": prompt_ids()},
        {"messages": MESSAGES},
    ):
        (found,) = read({**{name: v for name, v in row.items() if name != "prompt"}, **request})
        check_tokens(found)


def test_sglang_scores_a_whole_trajectory() -> None:
    ids = prompt_ids() + RESPONSE
    entries = [[None, ids[0], None], *([-1.0, i, None] for i in ids[1:36])]
    entries += [[value, i, "?"] for value, i in zip(LOGPROBS, RESPONSE, strict=True)]
    meta = {
        "finish_reason": {"type": "length", "length": 1},
        "prompt_tokens": 47,
        "input_token_logprobs": entries,
    }
    row = {"input_ids": ids, "loss_mask": [0] * 36 + [1] * 11, "response": {"text": "", "meta_info": meta}}
    (found,) = read(row, with_tokenizer=False)
    np.testing.assert_array_equal(found.trajectory.behavior_logprobs[36:], np.float32(LOGPROBS))
    assert found.truncated is None
    meta["input_token_logprobs"] = [*entries[1:], entries[0]]
    refuses(r"input_token_logprobs\[0\] is of token", row)


@pytest.mark.parametrize("kind", ["length", "abort"])
def test_a_cut_response_is_marked(kind: str) -> None:
    row = case("sglang")
    row["response"]["meta_info"]["finish_reason"] = {"type": kind}
    assert read(row)[0].truncated is True
    row = case("vllm_offline")
    row["outputs"][0]["finish_reason"] = kind
    assert read(row)[0].truncated is True
    row["outputs"][0]["finish_reason"] = "who knows"
    refuses("finish_reason = 'who knows'", row)


@pytest.mark.parametrize("status", ["truncated", "aborted", "failed"])
def test_slime_samples_that_were_not_completed_are_marked(status: str) -> None:
    assert read({**case("slime"), "status": status})[0].truncated is True
    refuses("status = 'pending'", {**case("slime"), "status": "pending"})


def test_slime_dump_gives_all_its_samples_and_only_trained_tokens_are_decisions() -> None:
    tools = {**case("slime"), "loss_mask": [1] * 5 + [0] * 3 + [1] * 3}
    first, second = read({"rollout_id": 3, "samples": [case("slime"), tools]})
    check_tokens(first)
    assert second.trajectory.loss_mask[36:].tolist() == [True] * 5 + [False] * 3 + [True] * 3
    assert first.trajectory.id != second.trajectory.id
    refuses(
        r"samples\[1\]: temperature = 0\.7",
        {"samples": [case("slime"), {**tools, "metadata": {}, "temperature": 0.7}]},
    )


def test_slime_samples_of_a_parquet_file(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([case("slime")]), tmp_path / "a.parquet")
    (row,) = read_rows(tmp_path / "a.parquet", Problems(), strict=False)
    (found,) = read({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.fields.items()})
    check_tokens(found)


def test_verl_agent_loops_are_read_and_its_text_dump_is_refused_by_name() -> None:
    loop = {
        "prompt_ids": prompt_ids(),
        "response_ids": RESPONSE,
        "response_mask": [1] * 11,
        "response_logprobs": LOGPROBS,
        "reward_score": 0.5,
    }
    (found,) = read(loop)
    check_tokens(found)
    assert found.trajectory.reward == 0.5
    refuses(
        "rollout_data_dir holds text alone",
        {"input": "a", "output": "b", "gts": "c", "score": 1.0, "step": 3},
    )
    refuses("as padding does", {**loop, "prompt_ids": [0, 0, *prompt_ids()]})


def test_vllm_log_probs_may_be_flat() -> None:
    row = case("vllm_offline")
    row["outputs"][0]["logprobs"] = LOGPROBS
    check_tokens(read(row)[0])
    flat = {
        "start_indices": list(range(0, 22, 2)),
        "end_indices": list(range(2, 24, 2)),
        "token_ids": [i for token_id in RESPONSE for i in (token_id, 9999)],
        "logprobs": [value for logprob in LOGPROBS for value in (logprob, -0.05)],
    }
    row["outputs"][0]["logprobs"] = flat
    check_tokens(read(row)[0])
    flat["token_ids"][0] = 7
    refuses(r"outputs\[0\]\.logprobs\[0\] is of token 7", row)


def test_vllm_scores_a_whole_trajectory() -> None:
    ids = prompt_ids() + RESPONSE
    values = [-1.0] * 36 + LOGPROBS
    entries = [None, *({str(i): {"logprob": v}} for i, v in list(zip(ids, values, strict=True))[1:])]
    row = {"input_ids": ids, "loss_mask": [0] * 36 + [1] * 11, "response": case("vllm_offline")}
    row["response"]["prompt_logprobs"] = entries
    np.testing.assert_array_equal(read(row)[0].trajectory.behavior_logprobs[36:], np.float32(LOGPROBS))


def test_several_answers_have_a_reward_each_or_none() -> None:
    row = case("n2")
    assert [one.trajectory.id for one in read(row)] == ["c1#0", "c1#1"]
    assert [one.trajectory.reward for one in read({**row, "reward": [1, -0.5]})] == [1.0, -0.5]
    refuses("reward = 1, but the row has 2 answers", {**row, "reward": 1})
    refuses("reward has 3 entries and the row 2 answers", {**row, "reward": [1, 2, 3]})
    for choice, reward in zip(row["response"]["choices"], (0.25, 0.75), strict=True):
        choice["reward"] = reward
    assert [one.trajectory.reward for one in read(row)] == [0.25, 0.75]
    del row["response"]["choices"][1]["reward"]
    refuses("some answers have a reward of their own", row)


def test_a_damaged_answer_among_several_is_named() -> None:
    row = case("n2")
    row["response"]["choices"][1]["logprobs"]["content"].pop(3)
    refuses("answer 1 of 2: ", row)


def test_sglang_gives_several_answers_as_a_list() -> None:
    row = case("sglang")
    del row["reward"]
    row["response"] = [row["response"], copy.deepcopy(row["response"])]
    assert [one.trajectory.id for one in read(row)] == ["s1#0", "s1#1"]


def test_parsed_tool_calls_and_reasoning_are_read_as_they_were_sampled() -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": '{"a": 1}'}}
    sampled = '<tool_call>\n{"arguments":{"a":1}, "name":"find"}\n</tool_call><|im_end|>'
    (found,) = read(answer_of(sampled, content=None, tool_calls=[call]))
    decisions = found.trajectory.input_ids[found.trajectory.loss_mask]
    assert tokenizer().decode(decisions) == sampled
    sampled = "<think>\nwell\n</think>\n\nBlue<|im_end|>"
    (found,) = read(answer_of(sampled, content="Blue", reasoning_content="well"))
    decisions = found.trajectory.input_ids[found.trajectory.loss_mask]
    assert tokenizer().decode(decisions) == sampled


def test_what_the_log_probs_do_not_cover_is_named() -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": "{}"}}
    refuses(
        "the answer's tool call 'find' is not among its tokens",
        answer_of("Blue<|im_end|>", content="Blue", tool_calls=[call]),
    )
    refuses(
        "the answer's reasoning 'well' is not among its tokens",
        answer_of("Blue<|im_end|>", content="Blue", reasoning_content="well"),
    )
    hidden = answer_of("Blue<|im_end|>", content="Blue")
    details = {"reasoning_tokens": 90}
    hidden["response"]["usage"] = {"completion_tokens": 92, "completion_tokens_details": details}
    refuses(r"usage\.completion_tokens = 92.*do not cover its reasoning", hidden)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"type": "reasoning", "summary": []}, "the answer has reasoning, which its log-probs do not cover"),
        ({"type": "function_call", "name": "f", "arguments": "{}"}, "the answer has tool calls"),
        ({"type": "web_search_call"}, "only one message can be read"),
    ],
)
def test_responses_with_more_than_a_message_are_refused_by_name(item: dict[str, Any], words: str) -> None:
    row = case("oai_responses")
    row["response"]["output"].insert(0, item)
    refuses(words, row)


def test_responses_prompt_may_be_the_requests_input() -> None:
    row = case("oai_responses")
    row["response"]["output"][0]["content"][0]["text"] = "Blue, I think. 🙂 Ünï"
    row["body"] = {"input": "Name a colour."}
    del row["messages"]
    check_tokens(read(row)[0])
    row["body"] = {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Name a colour."}]}]}
    check_tokens(read(row)[0])
    row["body"]["input"][0]["content"] = [{"type": "input_image", "image_url": "x"}]
    refuses(r"input\[0\]\.content\[0\] = .* is no text", row)


def test_tools_of_the_request_are_in_the_prompt() -> None:
    answer = answer_of("Blue<|im_end|>", content="Blue")
    plain, with_tools = read(answer)[0], read({**answer, "tools": TOOLS})[0]
    assert "Finds." in tokenizer().decode(with_tools.trajectory.input_ids)
    assert len(with_tools.trajectory.input_ids) > len(plain.trajectory.input_ids)
    in_body = {"response": answer["response"], "body": {"messages": MESSAGES, "tools": TOOLS}}
    assert read(in_body)[0].trajectory.input_ids.tolist() == with_tools.trajectory.input_ids.tolist()
    for place in ("request", "request_params"):
        in_extra = {
            "response": answer["response"],
            place: {"messages": MESSAGES, "extra_body": {"tools": TOOLS}},
        }
        assert read(in_extra)[0].trajectory.input_ids.tolist() == with_tools.trajectory.input_ids.tolist()
    refuses(
        "chat_template_kwargs: the chat template does not read 'enable'",
        {**answer, "request": {"extra_body": {"chat_template_kwargs": {"enable": 1}}}},
    )
    refuses(
        "chat_template_kwargs: the chat template does not read 'enable'",
        {**answer, "chat_template_kwargs": {"enable": 1}},
    )


def test_another_stop_token_than_the_templates_is_kept() -> None:
    other = tokenizer().decode([0])
    (found,) = read(answer_of("Blue" + other, content="Blue"))
    assert found.trajectory.input_ids[-1] == 0


def with_ids(sampled: str, **message: Any) -> dict[str, Any]:
    """The answer with its token ids."""
    row = answer_of(sampled, **message)
    ids = tokenizer()(sampled, add_special_tokens=False)["input_ids"]
    row["response"]["choices"][0]["token_ids"] = ids
    return row


CALL = {"type": "function", "function": {"name": "find", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("text", {"content": "Red it is"}),
        ("text", {"content": "is it Blue"}),
        ("reasoning", {"content": "Blue it is", "reasoning_content": "hm"}),
        ("reasoning", {"content": "Blue it is", "reasoning": "hm"}),
        ("tool call 0", {"content": None, "tool_calls": [CALL]}),
    ],
)
def test_what_token_ids_do_not_say_is_refused(what: str, message: dict[str, Any]) -> None:
    refuses(
        f"the answer's {what} .* is not among its tokens, which say 'Blue it is",
        with_ids("Blue it is<|im_end|>", **message),
    )


@pytest.mark.parametrize(
    ("sampled", "message"),
    [
        ("<think>\nwell\n</think>\n\nBlue<|im_end|>", {"content": "Blue", "reasoning_content": "\nwell\n"}),
        ("a<|im_start|>b c<|im_end|>", {"content": "ab  c"}),
        ("Blue, \u00dcn<|im_end|>", {"content": "Blue, \ufffd\ufffdn"}),
        ("one two\nStop:", {"content": "one two"}),
        ("well</think>Blue<|im_end|>", {"content": "assistant\nwell</think>Blue"}),
        ("x<tool_call>{'name': 'find'}<|im_end|>", {"content": "x", "tool_calls": [CALL]}),
        ("Blue<|im_end|>", {"content": None}),
    ],
)
def test_what_servers_parse_and_leave_out_is_taken(sampled: str, message: dict[str, Any]) -> None:
    (found,) = read(with_ids(sampled, **message))
    assert tokenizer().decode(found.trajectory.input_ids[found.trajectory.loss_mask]) == sampled


def test_the_texts_of_vllm_offline_and_sglang_belong_to_their_tokens() -> None:
    offline, sglang = case("vllm_offline"), case("sglang")
    offline["outputs"][0]["text"] = sglang["response"]["text"] = "Red"
    for row in (offline, sglang):
        refuses("the answer's text 'Red' is not among its tokens", row)


@pytest.mark.parametrize("wrong", [1 << 40, -1])
def test_a_number_that_is_no_token_id_is_named(wrong: int) -> None:
    row = with_ids("Blue<|im_end|>", content="Blue")
    row["response"]["choices"][0]["token_ids"][0] = wrong
    refuses(f"token id {wrong} is outside the vocabulary", row)
    sample = case("slime")
    sample["tokens"][-1] = wrong
    refuses(f"{wrong}", sample)


@pytest.mark.parametrize(
    ("said", "sampled"), [("Blue", " Blue"), ("Blue", "\nBlue"), ("a\nb", "a\n\nb"), ("a b", "a  b")]
)
def test_white_space_is_compared_as_it_was_recorded(said: str, sampled: str) -> None:
    (found,) = read(answer_of(f"{sampled}<|im_end|>", content=sampled))
    assert (
        tokenizer().decode(found.trajectory.input_ids[found.trajectory.loss_mask]) == f"{sampled}<|im_end|>"
    )
    refuses(
        "is '.*', but the token there is id|tokens and the response",
        answer_of(f"{sampled}<|im_end|>", content=said),
    )


def test_white_space_that_a_client_took_off_is_named() -> None:
    refuses(
        r"content\[0\] is ' Blue', .* white space; give it as it was sampled",
        answer_of(" Blue<|im_end|>", content="Blue"),
    )


class SentencePieces:
    """Decodes a token alone as Llama 2's tokenizer does: without its first space."""

    pieces = ("\u2581Blue", "Blue", "\u2581\u2581")

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.pieces[token]

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.pieces[i] for i in ids).replace("\u2581", " ").removeprefix(" ")


def test_the_first_space_of_sentencepiece_is_excused() -> None:
    tokens = Tokens(SentencePieces(), None)
    tokens.check([0, 0, 1, 2, 2], ["Blue", " Blue", "Blue", " ", "  "], "tokens")
    for token_id, text in ((1, " Blue"), (0, "  Blue"), (0, "\nBlue"), (2, "\n")):
        with pytest.raises(RowProblem, match=r"tokens\[0\] is "):
            tokens.check([token_id], [text], "tokens")


def test_images_are_refused_where_ids_are_recorded() -> None:
    row = case("n2")
    image = {"type": "image_url", "image_url": {"url": "http://x"}}
    row["messages"] = [{"role": "user", "content": [image, {"type": "text", "text": "Name a colour."}]}]
    for choice in row["response"]["choices"]:
        choice["token_ids"] = RESPONSE
    row["response"]["prompt_token_ids"] = prompt_ids()
    refuses(r"messages\[0\]\.content\[0\] = .* is no text, .* drop the row", row)


@pytest.mark.parametrize("recorded", ["Blue, I think.", "Blue, I think"])
def test_after_a_stop_string_no_end_token_is_expected(recorded: str) -> None:
    row = answer_of(recorded, content="Blue, I think")
    row["response"]["choices"][0]["stop_reason"] = "."
    (found,) = read(row)
    assert tokenizer().decode(found.trajectory.input_ids[found.trajectory.loss_mask]) == recorded
    assert found.truncated is None


def test_an_end_that_the_server_did_not_record_is_the_users_to_say() -> None:
    row = answer_of("Blue, I think.", content="Blue, I think.")
    refuses('has 5 tokens and the response 6 .*write "truncated": true', row)
    (found,) = read({**row, "truncated": True})
    assert found.truncated is True
    assert tokenizer().decode(found.trajectory.input_ids[found.trajectory.loss_mask]) == "Blue, I think."


def test_a_row_that_is_marked_truncated_may_have_its_end() -> None:
    row = answer_of("Blue<|im_end|>", content="Blue")
    (found,) = read({**row, "truncated": True})
    assert found.truncated is True
    row["response"]["choices"][0]["logprobs"]["content"][1]["logprob"] = None
    refuses(r"choices\[0\]\.logprobs\.content\[1\] is null on a decision", row)


def streamed(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its answer in chunks, a token each."""
    (choice,) = row["response"]["choices"]
    chunks: list[dict[str, Any]] = [{"delta": {"role": "assistant", "content": ""}, "logprobs": None}]
    for entry in choice["logprobs"]["content"]:
        text = "" if entry["token"] == "<|im_end|>" else entry["token"]
        chunks.append({"delta": {"content": text}, "logprobs": {"content": [entry]}, "finish_reason": None})
    chunks[-1]["finish_reason"] = "stop"
    kind = {"object": "chat.completion.chunk"}
    return {**row, "response": [{**kind, "choices": [{"index": 0, **chunk}]} for chunk in chunks]}


def test_a_stream_is_joined() -> None:
    row = answer_of("Blue, I think.<|im_end|>", content="Blue, I think.")
    (expected,), (found,) = read(row), read(streamed(row))
    assert found.trajectory.input_ids.tolist() == expected.trajectory.input_ids.tolist()
    np.testing.assert_array_equal(found.trajectory.behavior_logprobs, expected.trajectory.behavior_logprobs)
    assert found.truncated is None
    row = streamed(row)
    del row["response"][-2:]  # ends with " think", which is no token's name
    assert read(row)[0].truncated is True
    refuses("one chunk of a stream, .* the list of all chunks", {**row, "response": row["response"][-1]})
    refuses("response is a list of 2, .* one answer per row", {**row, "response": [{"choices": []}] * 2})


def test_calls_of_a_stream_are_joined() -> None:
    deltas: list[dict[str, Any]] = [
        {"reasoning_content": "h"},
        {"reasoning_content": "m"},
        {"tool_calls": [{"index": 0, "id": "1", "function": {"name": "find", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
    ]
    message = joined([{"choices": [{"delta": delta}]} for delta in deltas])["choices"][0]["message"]
    assert message["reasoning_content"] == "hm"
    assert message["tool_calls"] == [
        {"type": "function", "function": {"name": "find", "arguments": '{"a": 1}'}}
    ]


def completion(**beside: Any) -> dict[str, Any]:
    """A completion of "2+2=" as vLLM answers it: "4" and its end."""
    logprobs = {"tokens": ["4", "<|im_end|>"], "token_logprobs": [-0.5, -0.25]}
    choice = {"index": 0, "text": "4", "logprobs": logprobs, "finish_reason": "stop"}
    choice |= {"token_ids": [36, 2], "prompt_token_ids": [34, 27, 34, 45]}
    body = {"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": {"prompt_tokens": 4}}
    return {"prompt": "2+2=", "response": body, **beside}


def echoed(with_ids: bool) -> dict[str, Any]:
    row = completion()
    (choice,) = row["response"]["choices"]
    choice["logprobs"]["tokens"] = ["2", "+", "2", "=", *choice["logprobs"]["tokens"]]
    choice["logprobs"]["token_logprobs"] = [None, -7.0, -2.0, -5.0, *choice["logprobs"]["token_logprobs"]]
    if not with_ids:
        del choice["token_ids"], choice["prompt_token_ids"]
        choice["text"] = "2+2=4"  # vLLM leaves the prompt out of the text where it returns ids
    return row


@pytest.mark.parametrize("with_ids", [True, False])
def test_a_completion_with_echo_is_read_from_its_response_on(with_ids: bool) -> None:
    (expected,), (found,) = read(completion()), read(echoed(with_ids))
    assert expected.trajectory.input_ids.tolist() == [34, 27, 34, 45, 36, 2]
    assert found.trajectory.input_ids.tolist() == expected.trajectory.input_ids.tolist()
    np.testing.assert_array_equal(found.trajectory.behavior_logprobs, [0, 0, 0, 0, -0.5, -0.25])
    row = echoed(with_ids)
    (choice,) = row["response"]["choices"]
    choice["logprobs"] = {name: values[:4] for name, values in choice["logprobs"].items()}
    refuses(r"begins with the prompt \(echo\), and nothing follows: .* where its response begins", row)
    row = echoed(False)
    del row["response"]["usage"]
    refuses("nothing says how long it is: keep the answer's usage", row)


def test_the_chunks_of_a_completion_are_joined() -> None:
    row = completion()
    (choice,) = row["response"]["choices"]
    parts = [
        {
            "index": 0,
            "text": text,
            "token_ids": [choice["token_ids"][i]],
            "logprobs": {name: [values[i]] for name, values in choice["logprobs"].items()},
            "prompt_token_ids": choice["prompt_token_ids"] if i == 0 else None,
            "finish_reason": "stop" if i == 1 else None,
        }
        for i, text in enumerate(["4", ""])
    ]
    chunks = [{"id": "cmpl-1", "object": "text_completion", "choices": [part]} for part in parts]
    (expected,), (found,) = read(row), read({**row, "response": chunks})
    assert found.trajectory.input_ids.tolist() == expected.trajectory.input_ids.tolist()
    np.testing.assert_array_equal(found.trajectory.behavior_logprobs, expected.trajectory.behavior_logprobs)
    assert found.truncated is None
    chunks[1]["id"] = "cmpl-2"
    refuses("response is a list of 2, .* one answer per row", {**row, "response": chunks})


def test_vllms_answers_in_tokens_are_read() -> None:
    content = [{"token_id": 36, "logprob": -0.5, "rank": 1}, {"token_id": 2, "logprob": -0.25, "rank": 1}]
    choice = {"index": 0, "finish_reason": "stop", "token_ids": [36, 2], "logprobs": {"content": content}}
    row = {"request": {"token_ids": [34, 27, 34, 45]}, "response": {"request_id": "r", "choices": [choice]}}
    (found,) = read(row)
    assert found.trajectory.input_ids.tolist() == [34, 27, 34, 45, 36, 2]
    np.testing.assert_array_equal(found.trajectory.behavior_logprobs, [0, 0, 0, 0, -0.5, -0.25])
    content[1]["token_id"] = 3
    refuses("token_id:3.*but the token there is id 2", row)


def test_a_scored_chat_may_go_on_after_its_last_turn() -> None:
    chat = [*MESSAGES, {"role": "assistant", "content": TEXT}]
    ids = [*prompt_ids(), *RESPONSE, 198]  # the template's line break after the end of turn
    entries = [None, *({str(token): {"logprob": -0.01 * i}} for i, token in enumerate(ids[1:], 1))]
    row = {"messages": chat, "response": {"choices": [{"text": "."}], "prompt_logprobs": entries}}
    (found,) = read(row)
    assert found.trajectory.input_ids.tolist() == ids[:-1]
    np.testing.assert_allclose(
        found.trajectory.behavior_logprobs[-len(RESPONSE) :],
        [-0.01 * i for i in range(len(prompt_ids()), len(ids) - 1)],
        rtol=1e-6,
    )
    refuses(
        "entries and the trajectory",
        {**row, "response": {**row["response"], "prompt_logprobs": entries[:-2]}},
    )


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"prompt": ["a", "b"]}, "prompt is a list of 2 prompts; write a row for each"),
        ({"messages": [MESSAGES, MESSAGES]}, "messages is a list of 2 conversations; write a row for each"),
    ],
)
def test_a_batch_in_one_request_is_named(request_: dict[str, Any], said: str) -> None:
    refuses(said, {**completion(prompt=None), **request_})
