"""Rows that users gave, with the tokens that were sampled between [[ ]]."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import Families, shown

from pear_megatron.data.chat import ChatEncoder, Conversation
from pear_megatron.data.errors import RowProblem

ROWS = Path(__file__).parent / "rows"
ASK = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
BAR = "\uff5c"
R1_ASK = f"<bos><{BAR}User{BAR}>{{}}<{BAR}Assistant{BAR}>"
R1_EOS = f"<{BAR}end▁of▁sentence{BAR}>"
BLOCK = "<think>\n\n</think>\n\n"


def row(file: str, index: int = 0) -> dict[str, Any]:
    line = (ROWS / f"{file}.jsonl").read_text().splitlines()[index]
    fields: dict[str, Any] = json.loads(line)
    return {name: value for name, value in fields.items() if name != "id"}


def encode(families: Families, name: str, fields: dict[str, Any], **options: Any) -> list[str]:
    """The trajectories' texts with their decisions marked, without white space behind the last."""
    tokenizer = families(name)
    encoded = ChatEncoder(tokenizer, **options).encode(Conversation(**fields))
    return [shown(tokenizer, one).removesuffix("\n") for one in encoded]


CASES = {
    ("qwen3", "parts", 0): [ASK.format("Name a colour.") + "[[Blue.<|im_end|>]]"],
    ("qwen3", "multi", 0): [
        ASK.format("2+2?") + "[[<think>\nadd\n</think>\n\n4<|im_end|>]]",
        ASK.format("2+2?")
        + "4<|im_end|>\n"
        + ASK.format("3+3?")
        + "[[<think>\nadd again\n</think>\n\n6<|im_end|>]]",
    ],
    ("qwen3", "tools", 0): [
        ASK.format("Weather in Paris?")
        + '[[<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>]]\n'
        + ASK.format("<tool_response>\n22 C\n</tool_response>")
        + "[[It is 22 C.<|im_end|>]]"
    ],
    ("qwen3_training", "weight", 0): [
        ASK.format("Hi")
        + f"{BLOCK}BAD ANSWER<|im_end|>\n"
        + ASK.format("Again")
        + "[[good answer<|im_end|>]]"
    ],
    ("qwen3_training", "emptyturn", 0): [
        ASK.format("Hi") + f"{BLOCK}<|im_end|>\n" + ASK.format("Hm") + "[[Hello.<|im_end|>]]"
    ],
    ("llama3_training", "trail", 0): [
        "<bos><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
        "\n\n[[  spaced answer \n<|eot_id|>]]",
        "<bos><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
        "\n\nspaced answer<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHm<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[ends with newlines\n\n<|eot_id|>]]",
    ],
    **{
        ("deepseek_r1_distill", "single_think", i): [
            R1_ASK.format("2+2?") + f"<think>\n[[add\n</think>\n\n4{R1_EOS}]]"
        ]
        for i in range(4)
    },
    **{
        ("qwen3", "single_think", i): [ASK.format("2+2?") + "[[<think>\nadd\n</think>\n\n4<|im_end|>]]"]
        for i in (0, 1, 3)
    },
}


@pytest.mark.parametrize(("name", "file", "index"), CASES)
def test_row_becomes_what_was_sampled(name: str, file: str, index: int, families: Families) -> None:
    assert encode(families, name, row(file, index)) == CASES[name, file, index]


def test_tools_of_a_row_are_in_its_prompt(families: Families) -> None:
    (text,) = encode(families, "qwen2_5", row("tools_col"))
    prompt, _, answer = text.partition("[[")
    assert '{"type": "function", "function": {"name": "get_weather"}}' in prompt
    assert answer == "Hello.<|im_end|>]]"
    with pytest.raises(RowProblem, match=r"tools\[0\]\.function\.name: the chat template leaves it out"):
        encode(families, "llama3", row("tools_col"))


def test_call_that_the_template_leaves_out_is_refused_by_name(families: Families) -> None:
    with pytest.raises(
        RowProblem, match=r"messages\[1\]\.tool_calls\[0\]\.function\.name: the chat template leaves"
    ):
        encode(families, "smollm2", row("tools"))


def test_name_of_a_call_may_stand_in_its_id_alone(families: Families) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ '<tool_call>' + c['id'] + ' ' + (c.function.arguments | tojson) + '</tool_call>' }}{% endfor %}"
        "{% for n in messages %}{% for c in n.tool_calls or [] if c.id == m.tool_call_id %}!{% endfor %}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    call = {
        "id": "functions.get_weather:0",
        "function": {"name": "get_weather", "arguments": {"city": "Paris"}},
    }
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_call_id": call["id"], "content": "22 C"}]
    messages += [{"role": "assistant", "content": "22"}]
    (text,) = encode(families, "qwen3", {"messages": messages}, chat_template=template)
    assert '[[<tool_call>functions.get_weather:0 {"city": "Paris"}</tool_call><|im_end|>]]' in text
    assert "22 C!<|im_end|>" in text
    call["id"] = messages[2]["tool_call_id"] = "call_1"
    with pytest.raises(
        RowProblem, match=r"function\.name: .* leaves it out; .* id, .* \(functions\.NAME:0\)"
    ):
        encode(families, "qwen3", {"messages": messages}, chat_template=template)


def test_what_stands_beside_the_text_of_a_part_is_named_unless_it_says_nothing(families: Families) -> None:
    fields = row("parts")
    part = fields["messages"][0]["content"][0]
    expected = encode(families, "qwen3", fields)
    part |= {"cache_control": {"type": "ephemeral"}, "annotations": []}
    assert encode(families, "qwen3", fields) == expected
    part["citations"] = [1]
    with pytest.raises(RowProblem, match=r"messages\[0\]\.content\[0\]\.citations = \[1\] would not be read"):
        encode(families, "qwen3", fields)


def test_part_that_is_no_text_is_refused_by_name(families: Families) -> None:
    fields = row("parts")
    fields["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": "a.png"}})
    with pytest.raises(RowProblem, match=r"messages\[0\]\.content\[1\] = .*'image_url'.* is no text part"):
        encode(families, "qwen3", fields)


@pytest.mark.parametrize(
    "name", ["smollm2", "qwen2_5_training", "qwen3_training", "llama3_training", "gemma_training"]
)
def test_decisions_end_where_the_policy_stopped(name: str, families: Families) -> None:
    for text in encode(families, name, row("trail")):
        for decisions in text.split("[[")[1:]:
            written, _, behind = decisions.partition("]]")
            assert written.rpartition("<")[0] in ("  spaced answer \n", "ends with newlines\n\n")
            assert behind.startswith("\n") or not behind


def test_empty_turn_is_no_decision_and_said_so(families: Families) -> None:
    encoder = ChatEncoder(families("qwen3"))
    (encoded,) = encoder.encode(Conversation(**row("emptyturn")))
    assert shown(families("qwen3"), encoded).count("[[") == 1
    assert encoder.notes["assistant turns without text, thinking or calls, which are no decisions"] == 1
    with pytest.raises(RowProblem, match="every assistant turn is an empty response; drop"):
        encoder.encode(Conversation(messages=row("emptyturn")["messages"][:2]))


def test_character_without_a_token_is_said(families: Families) -> None:
    encoder = ChatEncoder(families("smollm2"))
    encoder.encode(Conversation(prompt="Hi", response="plain \U0001f642"))
    assert not encoder.notes
    encoder.encode(Conversation(prompt="Hi", response="control \x13 character"))
    assert list(encoder.notes) == [
        "responses that the tokenizer changes, for it normalises or has no token for a character"
    ]


def test_role_that_the_template_does_not_know_is_refused(families: Families) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "critic", "content": "Bad."}]
    messages.append({"role": "assistant", "content": "Hello"})
    with pytest.raises(
        RowProblem, match=r"messages\[1\]\.content \(role 'critic'\): the chat template leaves it out"
    ):
        encode(families, "qwen3", {"messages": messages})


def test_splitting_says_what_it_costs(families: Families) -> None:
    encoder = ChatEncoder(families("qwen3"))
    first, second = encoder.encode(Conversation(**row("multi")))
    assert (first.turn, second.turn) == (0, 1)
    assert encoder.notes["rows split into their turns"] == 1
    assert encoder.notes["tokens added by splitting"] == len(first.input_ids)


def test_whole_is_refused_where_one_row_cannot_hold_all_contexts(families: Families) -> None:
    with pytest.raises(RowProblem, match=r"messages\[3\]: .* data\.multi_turn=split \(--multi-turn split\)"):
        encode(families, "qwen3", row("multi"), multi_turn="whole")


def test_split_makes_every_turn_a_trajectory(families: Families) -> None:
    encoder = ChatEncoder(families("qwen2_5"), multi_turn="split")
    fields = row("multi")["messages"]
    assert [one.turn for one in encoder.encode(Conversation(messages=fields))] == [0, 1]
    assert [one.turn for one in encoder.encode(Conversation(messages=fields[:2]))] == [None]
    fields[1]["weight"] = 0
    assert [one.turn for one in encoder.encode(Conversation(messages=fields))] == [None]


RAW = {
    "ended": ({"response": "4<|im_end|>"}, ASK.format("2+2?") + "[[4<|im_end|>]]"),
    "not ended": ({"response": " 4\n"}, ASK.format("2+2?") + "[[ 4\n<|im_end|>]]"),
    "truncated": ({"response": "4 beca", "truncated": True}, ASK.format("2+2?") + "[[4 beca]]"),
    "thinking switched off": (
        {"response": "4", "chat_template_kwargs": {"enable_thinking": False}},
        ASK.format("2+2?") + f"{BLOCK}[[4<|im_end|>]]",
    ),
    "messages for a prompt": (
        {
            "prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+2?"}],
            "response": "4",
        },
        "<|im_start|>system\nAdd.<|im_end|>\n" + ASK.format("2+2?") + "[[4<|im_end|>]]",
    ),
}


@pytest.mark.parametrize("kind", RAW)
def test_response_is_raw(kind: str, families: Families) -> None:
    fields, expected = RAW[kind]
    assert encode(families, "qwen3", {"prompt": "2+2?", **fields}) == [expected]


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("qwen3", ASK.format("2+2?")),
        ("qwen3", "\n<|im_start|>user\n2+2?"),
        ("qwen3", "2+2?<|im_end|>\n<|im_start|>assistant"),
        ("llama3", "<bos>2+2?"),
        ("gemma3", "<start_of_turn>user\n2+2?"),
        ("deepseek_r1_distill", R1_ASK.format("2+2?").removeprefix("<bos>")),
    ],
)
def test_a_prompt_that_is_rendered_already_is_refused(name: str, prompt: str, families: Families) -> None:
    fields = {"prompt": prompt, "response": "4"}
    with pytest.raises(RowProblem, match=r"prompt (begins|ends) with .* a prompt that is rendered already"):
        encode(families, name, fields)
    (raw,) = encode(
        families, name, fields, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert raw.startswith(prompt.rstrip())


@pytest.mark.parametrize(
    "prompt",
    ["<|im_end|> shows up in my output. Why?", "<|im_start|> and <|im_end|> are ChatML's. Are they?"],
)
def test_a_prompt_about_a_special_token_is_not_a_rendered_one(prompt: str, families: Families) -> None:
    (raw,) = encode(families, "qwen3", {"prompt": prompt, "response": "4"})
    assert prompt in raw


def test_texts_that_speak_of_special_tokens_are_taken_and_noted(families: Families) -> None:
    encoder = ChatEncoder(families("qwen3"))
    encoder.encode(
        Conversation(prompt="What does <|im_start|> do, what <think>?", response="<|im_start|> begins")
    )
    assert dict(encoder.notes) == {
        "messages whose text contains a special token, which becomes that token": 1,
        "responses with a special token before their end, which becomes that token": 1,
    }
    encoder.encode(Conversation(prompt="<think> is what?", response="A tag.<|im_end|>"))
    assert sum(encoder.notes.values()) == 2


def test_no_answer_stands_inside_the_think_block_that_the_prompt_opens(families: Families) -> None:
    response, messages = as_both("4")
    with pytest.raises(
        RowProblem, match=r"answers inside the think block .* begin it with </think> if there"
    ):
        encode(families, "deepseek_r1_distill", response)
    encoder = ChatEncoder(families("deepseek_r1_distill"))
    (encoded,) = encoder.encode(Conversation(**messages))
    assert shown(families("deepseek_r1_distill"), encoded).endswith(f"<think>\n[[\n</think>\n\n4{R1_EOS}]]")
    (said,) = encoder.notes
    assert said.startswith("turns without thinking that close the thinking")
    (text,) = encode(
        families, "deepseek_r1_distill", {"prompt": "2+2?", "response": "add", "truncated": True}
    )
    assert text.endswith("<think>\n[[add]]")
    (text,) = encode(families, "deepseek_r1_distill", {"prompt": "2+2?", "response": "</think>\n\n4"})
    assert text.endswith(f"<think>\n[[</think>\n\n4{R1_EOS}]]")


def as_both(text: str) -> list[dict[str, Any]]:
    """A row as prompt and response, and as messages."""
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": text}]
    return [{"prompt": "2+2?", "response": text}, {"messages": messages}]


@pytest.mark.parametrize("form", [0, 1])
def test_thinking_that_does_not_fit_to_its_generation_prompt_is_refused(
    form: int, families: Families
) -> None:
    unopened, unclosed = as_both("add\n</think>\n\n4")[form], as_both("<think>\nadd so lo")[form]
    with pytest.raises(
        RowProblem, match="closes thinking with </think> that neither .* begin it with <think>"
    ):
        encode(families, "qwen3", unopened)
    with pytest.raises(
        RowProblem, match='opens thinking with <think> and never closes it.*"truncated": true'
    ):
        encode(families, "qwen3", unclosed)
    (cut,) = encode(families, "qwen3", {**unclosed, "truncated": True})
    assert cut.endswith("[[<think>\nadd so lo]]")
    thinks = {
        **as_both("<think>\nadd\n</think>\n\n4")[form],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    with pytest.raises(
        RowProblem, match=r"thinks, and the generation prompt has closed .* \(enable_thinking\)"
    ):
        encode(families, "qwen3", thinks)
    encoder = ChatEncoder(families("qwen3"))
    encoder.encode(Conversation(**as_both("The tag </think> ends it.")[form]))
    assert encoder.notes["turns with a </think> that nothing opens"] == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "gptoss": "<|channel|>analysis<|message|>add<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
        "gemma4_v5": "<|channel>thought\nadd\n<channel|>4<turn|>",
    }.items(),
)
def test_inline_thinking_goes_where_the_template_has_thinking(
    name: str, expected: str, families: Families
) -> None:
    response, messages = as_both("<think>\nadd\n</think>\n\n4")
    (text,) = encode(families, name, messages)
    assert text.endswith(f"[[{expected}]]")
    again = [
        *messages["messages"],
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "5"},
    ]
    assert all("<think>" not in text for text in encode(families, name, {"messages": again}))
    with pytest.raises(RowProblem, match="give it as messages, with the thinking in reasoning_content"):
        encode(families, name, response)


def test_a_response_has_the_header_that_the_template_writes_before_answers(families: Families) -> None:
    response, _ = as_both("4")
    with pytest.raises(
        RowProblem, match=r"response has no '<\|channel\|>', .* header and all, or give it as messages"
    ):
        encode(families, "gptoss", response)
    sampled = (
        "<|channel|>analysis<|message|>add<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    )
    raw, written = as_both(sampled)
    assert encode(families, "gptoss", raw)[0].endswith(f"assistant[[{sampled}]]")
    with pytest.raises(RowProblem, match=r"messages\[1\]\.content contains '<\|return\|>'"):
        encode(families, "gptoss", written)
    _, written = as_both(sampled.removesuffix("<|return|>"))
    with pytest.raises(
        RowProblem, match=r"content begins with '<\|channel\|>', .* there twice; give bare texts"
    ):
        encode(families, "gptoss", written)
    encoder = ChatEncoder(families("glm4moe"))
    encoder.encode(Conversation(**response))
    assert list(encoder.notes) == [r"responses without the '\n' with which the chat template begins a turn"]


def test_text_that_brings_the_templates_tags_is_refused(families: Families) -> None:
    messages = row("tools")["messages"]
    messages[2]["content"] = "<tool_response>\n22 C\n</tool_response>"
    with pytest.raises(
        RowProblem, match=r"messages\[2\]\.content begins with '<tool_response>', .* tags off the text"
    ):
        encode(families, "qwen3", {"messages": messages})
    messages = row("tools")["messages"]
    messages[1]["content"] = "Let me see."
    assert "[[Let me see.\n<tool_call>" in encode(families, "qwen3", {"messages": messages})[0]
    messages[1]["content"] = (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    )
    with pytest.raises(RowProblem, match=r"messages\[1\]\.content has '<tool_call>', .* keep one of the two"):
        encode(families, "qwen3", {"messages": messages})


def test_text_that_the_template_moves_behind_the_result_of_its_call_is_refused(families: Families) -> None:
    messages = row("tools")["messages"]
    messages[1]["content"] = "Let me see."
    with pytest.raises(RowProblem, match=r"messages\[1\]\.content stands behind the result of the call"):
        encode(families, "gemma4_v5", {"messages": messages})


def test_end_behind_a_call_that_the_template_does_not_write_is_noted(families: Families) -> None:
    messages = row("tools")["messages"]
    messages[1]["reasoning_content"] = messages[3]["reasoning_content"] = "hm"
    said = f"turns with calls that end with {R1_EOS!r}, which the chat template does not write there"
    for name, count in (("deepseek_r1_distill", 1), ("qwen3", 0)):
        encoder = ChatEncoder(families(name))
        encoder.encode(Conversation(messages=messages))
        assert encoder.notes[said] == count


def test_date_of_today_in_a_context_is_noted(families: Families) -> None:
    template = families.templates["qwen3"]
    dated = "{{ date if date is defined else strftime_now('%d %B %Y') }}" + template
    (response, messages), today = as_both("4"), datetime.now().strftime("%d %B %Y")
    encoder = ChatEncoder(families("qwen3"), chat_template=dated)
    encoder.encode(Conversation(**response))
    encoder.encode(Conversation(**messages))
    (said,) = [note for note in encoder.notes if f"the chat template writes today's date, {today};" in note]
    assert encoder.notes[said] == 2
    for options in ({"chat_template": dated, "chat_template_kwargs": {"date": "1 May 2025"}}, {}):
        encoder = ChatEncoder(families("qwen3"), **options)
        encoder.encode(Conversation(**response))
        assert not encoder.notes


def test_nulls_in_tools_and_names_that_vanish_are_noted(families: Families) -> None:
    schema = {"name": "f", "description": None, "parameters": {}}
    messages = [{"role": "user", "content": "Hi", "name": "alice"}, {"role": "assistant", "content": "Hello"}]
    encoder = ChatEncoder(families("qwen2_5"))
    encoder.encode(Conversation(messages=messages, tools=[{"type": "function", "function": schema}]))
    assert dict(encoder.notes) == {
        "messages with a 'name' that the chat template does not write": 1,
        "rows whose tools have null in their schemas, which stands there": 1,
    }
    named = families.templates["qwen2_5"].replace("+ message.role +", "+ (message.name or message.role) +")
    encoder = ChatEncoder(families("qwen2_5"), chat_template=named)
    encoder.encode(Conversation(messages=messages))
    assert not encoder.notes


def test_keys_that_are_not_read_are_counted_by_name(families: Families) -> None:
    user = {"role": "user", "content": "Hi", "timestamp": 1}
    answer = {"role": "assistant", "content": "Hello", "timestamp": 2, "vendor": None, "rating": 5}
    encoder = ChatEncoder(families("llama3"))
    encoder.encode(Conversation(messages=[user, answer]))
    encoder.encode(Conversation(prompt=[user], response="Hello"))
    assert dict(encoder.notes) == {
        "messages with 'timestamp', which is not read": 3,
        "messages with 'rating', which is not read": 1,
    }
    many = {f"key{i}": i for i in range(20)}
    encoder.encode(Conversation(messages=[user, {**answer, **many}]))
    assert len(encoder.notes) == 9
    assert encoder.notes["messages with a key of some other name, which is not read"] == 14


def test_nulls_among_arguments_are_written_and_noted(families: Families) -> None:
    call = {"name": "f", "arguments": {"x": None}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}]
    encoder = ChatEncoder(families("qwen3"))
    (encoded,) = encoder.encode(Conversation(messages=messages))
    assert '{"x": null}' in shown(families("qwen3"), encoded)
    assert encoder.notes["messages whose calls have null among their arguments, which stands there"] == 1


def test_nulls_in_tools_stay(families: Families) -> None:
    schema = {"name": "f", "parameters": {"properties": {"x": {"default": None}}}}
    (text,) = encode(families, "qwen3", {"prompt": "Hi", "response": "4", "tools": [schema]})
    assert '{"default": null}' in text


@pytest.mark.parametrize("function", [["f"], "f", {"description": "f"}])
def test_a_tool_without_a_name_is_named(function: Any, families: Families) -> None:
    tools = [{"type": "function", "function": function}]
    with pytest.raises(RowProblem, match=r"tools\[0\] = .* JSON schema of a function with its name"):
        encode(families, "qwen3", {"prompt": "Hi", "response": "4", "tools": tools})


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("prompt", {"prompt": "a\ud83d", "response": "b"}),
        ("response", {"prompt": "a", "response": "b\ud83d"}),
        (
            r"messages\[1\]\.content",
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\ud83d"}]},
        ),
    ],
)
def test_half_a_character_is_named(field: str, fields: dict[str, Any], families: Families) -> None:
    with pytest.raises(RowProblem, match=rf"{field} = .* holds half a character"):
        encode(families, "qwen3", fields)


def test_stop_token_in_the_middle_is_refused(families: Families) -> None:
    with pytest.raises(RowProblem, match=r"response contains '<\|im_end\|>', the token that ends a turn"):
        encode(families, "qwen3", {"prompt": "Hi", "response": "a<|im_end|>\n<|im_start|>user\nb"})
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a<|im_end|>b"}]
    with pytest.raises(RowProblem, match=r"messages\[1\]\.content contains '<\|im_end\|>'"):
        encode(families, "qwen3", {"messages": messages})


@pytest.mark.parametrize(
    ("name", "ends"),
    {
        "gptoss": ["<|return|>"],
        "glm4moe": ["<|user|>"],
        "phi3": ["<|end|>"],
        "cohere2": ["<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"],
        "gemma3": ["<end_of_turn>"],
        "idefics3": ["<end_of_utterance>"],
        "deepseekv3": [R1_EOS],
    }.items(),
)
def test_turn_ends_as_the_template_says(name: str, ends: list[str], families: Families) -> None:
    tokenizer = families(name)
    heads = {"gptoss": "<|channel|>final<|message|>", "deepseekv3": "</think>"}
    response = heads.get(name, "") + "Hello"
    (encoded,) = ChatEncoder(tokenizer).encode(Conversation(prompt="Hi", response=response))
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids[-len(ends) :]) == ends


def test_call_ends_with_the_token_that_hands_over_to_the_tool(families: Families) -> None:
    (first, second) = encode(families, "glm4moe", row("tools"))
    assert first.endswith("</tool_call><|observation|>]]")
    assert second.endswith("[[\nIt is 22 C.<|user|>]]")
    (both,) = encode(families, "gptoss", row("tools"))
    assert both.count("<|call|>]]") == 1
    assert both.endswith("<|return|>]]")


def test_unknown_template_argument_is_refused(families: Families) -> None:
    fields = {"prompt": "Hi", "response": "b", "chat_template_kwargs": {"enable_thinkin": False}}
    with pytest.raises(RowProblem, match=r"does not read 'enable_thinkin'; it reads enable_thinking"):
        encode(families, "qwen3", fields)


def test_arguments_of_the_row_go_over_those_of_the_encoder(families: Families) -> None:
    off = {"enable_thinking": False}
    fields = {"prompt": "Hi", "response": "b"}
    assert BLOCK in encode(families, "qwen3", fields, chat_template_kwargs=off)[0]
    fields |= {"chat_template_kwargs": {"enable_thinking": True}}
    assert BLOCK not in encode(families, "qwen3", fields, chat_template_kwargs=off)[0]


def test_documents_are_in_the_prompt_or_the_row_is_refused(families: Families) -> None:
    fields = {
        "prompt": "Capital?",
        "response": "Lima",
        "documents": [{"title": "Peru", "text": "Its capital: Lima."}],
    }
    template = (
        "{% for d in documents %}{{ d.title }}: {{ d.text }}\n{% endfor %}" + families.templates["llama3"]
    )
    assert encode(families, "llama3", fields, chat_template=template)[0].startswith(
        "Peru: Its capital: Lima.\n"
    )
    with pytest.raises(RowProblem, match=r"documents\[0\]\.title: the chat template leaves it out"):
        encode(families, "llama3", fields)


def test_generation_marks_are_checked(families: Families) -> None:
    marked = families.templates["llama3_training"]
    assert marked.count("{%- generation %}") == 1
    everything = "{% generation %}" + families.templates["llama3"] + "{% endgeneration %}"
    fields = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    with pytest.raises(
        RowProblem, match=r"messages\[0\]\.content: the chat template has it in its \{% generation %\}"
    ):
        encode(families, "llama3", fields, chat_template=everything)
    nothing = families.templates["llama3"] + "{% generation %}{% endgeneration %}"
    with pytest.raises(
        RowProblem, match=r"messages\[1\]\.content: the chat template leaves it out of its \{% gener"
    ):
        encode(families, "llama3", fields, chat_template=nothing)


def test_recorded_answers_are_encoded_as_rows_are(families: Families) -> None:
    encoder = ChatEncoder(families("qwen3"))
    ask = Conversation(messages=[{"role": "user", "content": "2+2?"}])
    answer = {"role": "assistant", "content": "4", "reasoning_content": "add"}
    (encoded,) = encoder.encode(Conversation(messages=[*ask.messages, answer]))
    context, response = encoder.generation_prompt(ask), encoder.response_ids(ask, answer, truncated=False)
    assert context + response == encoded.input_ids
    assert len(response) == sum(encoded.loss_mask)
    assert encoder.response_ids(ask, "<think>\nadd\n</think>\n\n4", truncated=False) == response
    assert encoder.response_ids(ask, answer, truncated=True) == response[:-1]


def test_what_is_written_in_another_way_than_it_stands_there_is_noted(families: Families) -> None:
    parts = [{"type": "text", "text": "Weather"}, {"type": "text", "text": "in Paris?"}]
    call = {"function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    encoder = ChatEncoder(families("qwen3"))
    encoder.encode(Conversation(messages=[{"role": "user", "content": parts}, answer]))
    said = "; ".join(encoder.notes)
    assert "messages of several text parts" in said
    assert "JSON text, are written anew" in said
