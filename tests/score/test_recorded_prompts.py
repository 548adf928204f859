"""What the prompt of a recorded answer was: arguments of the chat template, its day, and what an answer echoes."""

from __future__ import annotations

import copy
from collections import Counter
from datetime import datetime
from typing import Any

import pytest

from pear_megatron.score.rows import RowReader
from tests.score.recorded_cases import MESSAGES, prompt_ids, read, refuses, tokenizer

DATED = (
    "{{ strftime_now('%Y-%m-%d') }} {{ reasoning_effort | default('medium') }}\n"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IN_PARTS = DATED.replace(
    "{{ message['content'] }}",
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}",
)
AUGUST = 1754400000  # 5 August 2025, 13:20 UTC


def content() -> list[dict[str, Any]]:
    ids = tokenizer()("Blue<|im_end|>", add_special_tokens=False)["input_ids"]
    return [{"token": tokenizer().decode([i]), "logprob": -0.5} for i in ids]


def chat(**request: Any) -> dict[str, Any]:
    """vLLM's answer in a batch file."""
    choice = {
        "message": {"role": "assistant", "content": "Blue"},
        "logprobs": {"content": content()},
        "finish_reason": "stop",
    }
    body = {"created": AUGUST, "choices": [choice]}
    return {"body": {"messages": MESSAGES, **request}, "response": {"status_code": 200, "body": body}}


def responses(**answer: Any) -> dict[str, Any]:
    part = {"type": "output_text", "text": "Blue", "logprobs": content()}
    output = [{"type": "message", "role": "assistant", "content": [part]}]
    return {"input": "Name a colour.", "response": {"object": "response", "output": output, **answer}}


def dated(template: str = DATED) -> RowReader:
    own = copy.deepcopy(tokenizer())
    own.chat_template = template
    return RowReader("import", Counter(), tokenizer=own)


def prompt(row: dict[str, Any], by: RowReader | None = None) -> str:
    (found,) = read(row, by=by)
    ids = found.trajectory.input_ids[~found.trajectory.loss_mask]
    return str(tokenizer().decode(ids))


def test_the_prompt_has_the_day_and_the_effort_of_the_request() -> None:
    rows = dated()
    assert prompt(chat(reasoning_effort="high"), rows).startswith("2025-08-05 high\n")
    assert prompt(responses(created_at=AUGUST, reasoning={"effort": "low"}), rows).startswith(
        "2025-08-05 low\n"
    )
    assert not rows.notes
    assert prompt(chat(reasoning_effort="high")) == tokenizer().decode(prompt_ids())  # not read there


def test_a_day_that_is_not_known_is_said() -> None:
    rows, row = dated(), chat()
    del row["response"]["body"]["created"]
    today = f"{datetime.now():%Y-%m-%d}"
    assert prompt(row, rows).startswith(today)
    ((note, count),) = rows.notes.items()
    assert (f"today's ({today})" in note, count) == (True, 1)


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [("enable_thinking", False, "chat_template_kwargs"), ("chat_template", "{{ 1 }}", "--chat-template")],
)
def test_what_else_would_change_the_prompt_is_refused(name: str, value: Any, instead: str) -> None:
    refuses(f"{name} = .* beside the messages is not read.*{instead}", chat(**{name: value}))


def test_text_parts_have_a_line_each() -> None:
    parts = [{"type": "text", "text": "Name a"}, {"type": "text", "text": "colour."}]
    row = chat(messages=[{"role": "user", "content": parts}])
    rows = dated()
    assert "user\nName a\ncolour.<|im_end|>" in prompt(row, rows)
    assert [count for note, count in rows.notes.items() if "line break" in note] == [1]
    assert "user\nName acolour.<|im_end|>" in prompt(row, dated(IN_PARTS))
    row = responses(created_at=AUGUST) | {"input": [{"role": "user", "content": parts}]}
    assert "user\nName a\ncolour.<|im_end|>" in prompt(row, dated())


def test_a_system_column_is_in_the_prompt_of_a_chat() -> None:
    written = chat(messages=[{"role": "system", "content": "Be brief."}, *MESSAGES])
    by = dated()
    assert prompt(chat() | {"system": "Be brief."}, by) == prompt(written, dated())
    assert prompt(chat(system="Be brief."), by) == prompt(written, dated())
    assert not by.notes
    tokens = [one["token"] for one in content()]
    logprobs = {"tokens": tokens, "token_logprobs": [-0.5] * len(tokens)}
    answer = {"text": "Blue", "logprobs": logprobs, "finish_reason": "stop"}
    row = {"prompt": "Hi", "system": "Be brief.", "choices": [answer]}
    refuses("a system message beside the text prompt of a completion", row)


def test_what_an_answer_of_responses_echoes_is_in_the_prompt() -> None:
    assert "system\nBe brief.<|im_end|>" in prompt(responses(instructions="Be brief."))
    row = responses(instructions="Be brief.") | {"messages": MESSAGES}
    refuses(r"response\.instructions = 'Be brief\.' are not in the row's request", row)
    tools = [{"type": "function", "name": "find", "parameters": {}}]
    refuses(r"response\.tools = .* give them as tools", responses(tools=tools))
    assert "find" in prompt(responses(tools=tools) | {"tools": tools})
    refuses(
        "previous_response_id = 'resp_0': .* whole conversation as messages",
        responses(previous_response_id="resp_0"),
    )
    assert read({**responses(previous_response_id="resp_0"), "messages": MESSAGES})
