"""Whatever stands in the texts, a turn becomes what its policy wrote, or the row is refused."""

from __future__ import annotations

from functools import cache
from itertools import groupby

import pytest
from chat_tokenizers import Families
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pear_megatron.data.chat import ChatEncoder, Conversation
from pear_megatron.data.errors import RowProblem

TEMPLATES = [
    "smollm2",
    "qwen3",
    "qwen3_training",
    "llama3_1",
    "deepseek_r1_distill",
    "glm4moe",
    "gptoss",
    "gemma3",
]
TAGS = [
    "<think>",
    "</think>",
    "<think>\n\n</think>\n\n",
    "<tool_call>",
    "<|im_end|>",
    "<|im_start|>user\n",
    "</s>",
]
ODD = [
    "\n",
    " ",
    "\t",
    "\u00a0",
    "\u2028",
    "é",
    "e\u0301",
    "日本",
    "🙂",
    "{{ x }}",
    '"\\n"',
    "Zq0x",
    "assistant",
    *TAGS,
]
# What may stand before the text: what the template or the text itself opens and closes the turn's thinking with.
HEADS = ("", "</think>", "<|channel|>final<|message|>")
# SmolLM2 has no token for some others.
BASIC = st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs", "Cc"])
texts = st.lists(st.one_of(st.sampled_from(ODD), st.text(BASIC, max_size=6)), min_size=1, max_size=6).map(
    "".join
)


@cache
def encoder_of(name: str, families: Families) -> ChatEncoder:
    return ChatEncoder(families(name))


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(asked=texts, first=texts, again=texts, second=texts)
def test_odd_texts_are_sampled_whole_or_refused(
    name: str, asked: str, first: str, again: str, second: str, families: Families
) -> None:
    tokenizer, encoder = families(name), encoder_of(name, families)
    roles = ("user", "assistant", "user", "assistant")
    messages = [
        {"role": role, "content": text}
        for role, text in zip(roles, (asked, first, again, second), strict=True)
    ]
    try:
        encodings = encoder.encode(Conversation(messages=messages))
    except RowProblem:
        return
    runs = []
    for encoded in encodings:
        pairs = zip(encoded.loss_mask, encoded.input_ids, strict=True)
        runs += [
            [token for _, token in run] for decision, run in groupby(pairs, lambda pair: pair[0]) if decision
        ]
    answers = [text for text in (first, second) if text.strip()]
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers, strict=True):
        written = tokenizer.decode(run[:-1])  # without the end, in which a short text may stand as well
        body = answer.strip().removeprefix("<think>").strip()
        assert body in written
        assert run[-1] in encoder.special_ids
        if body:
            assert written.rpartition(body)[0].replace("<think>", "").strip() in HEADS


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(asked=texts, response=texts)
def test_odd_response_is_raw(name: str, asked: str, response: str, families: Families) -> None:
    tokenizer = families(name)
    try:
        (encoded,) = encoder_of(name, families).encode(
            Conversation(prompt=asked, response=response, truncated=True)
        )
    except RowProblem:
        return
    decisions = [token for token, flag in zip(encoded.input_ids, encoded.loss_mask, strict=True) if flag]
    written = tokenizer.decode(decisions)
    assert written in (
        response,
        response.lstrip().removeprefix("<think>"),
        response.lstrip().removeprefix("<think>\n"),
    )
