"""Every conversation kind through every chat template that TRL ships."""

from __future__ import annotations

import json
import re
from itertools import groupby
from typing import Any

import pytest
from chat_tokenizers import Families, templates

from pear_megatron.data.chat import ChatEncoder, Conversation, Encoded
from pear_megatron.data.errors import RowProblem

Message = dict[str, Any]


def user(text: Any) -> Message:
    return {"role": "user", "content": text}


def assistant(text: Any, **others: Any) -> Message:
    return {"role": "assistant", "content": text, **others}


ARGUMENTS = {"city": "Paris", "days": 17}
CALLS = [{"type": "function", "id": "call00001", "function": {"name": "get_weather", "arguments": ARGUMENTS}}]
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "22 C, sunny"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "description": "its name"}}}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": SCHEMA}}
]
PLAIN = [user("Capital of Peru?"), assistant("Lima."), user("And of Chile?"), assistant("Santiago.")]
ASK = user("Weather in Rome?")

PLAIN_KINDS: dict[str, list[Message]] = {
    "one turn": PLAIN[:2],
    "two turns": PLAIN,
    "thinking inline": [
        user("2+2?"),
        assistant("<think>\nadd both\n</think>\n\nfour"),
        user("3+3?"),
        assistant("<think>\nadd again\n</think>\n\nsix"),
    ],
    "parts": [
        user([{"type": "text", "text": "Name a colour."}]),
        assistant([{"type": "text", "text": "Blue."}]),
    ],
    "white space": [
        user("Hi there"),
        assistant("  spaced answer \n"),
        user("Hm"),
        assistant("newlines behind\n\n"),
    ],
    "weight": [
        user("Hi there"),
        assistant("BAD ANSWER", weight=0),
        user("Again"),
        assistant("good answer", weight=1),
    ],
    "empty turn": [user("Hi there"), assistant(""), user("Hm"), assistant("Hello.")],
}
THINKING_KINDS: dict[str, list[Message]] = {
    "thinking": [
        user("2+2?"),
        assistant("four", reasoning_content="add both"),
        user("3+3?"),
        assistant("six", reasoning_content="add again"),
    ]
}
CALLING_KINDS: dict[str, list[Message]] = {
    "call": [ASK, assistant(None, tool_calls=CALLS), RESULT, assistant("It is fine.")],
    "thinking and call": [
        ASK,
        assistant("", reasoning_content="need a tool", tool_calls=CALLS),
        RESULT,
        assistant("It is fine.", reasoning_content="done now"),
    ],
}
OTHER_KINDS: dict[str, list[Message]] = {
    "system": [{"role": "system", "content": "Be terse."}, *PLAIN],
    "text and call": [ASK, assistant("Let me look.", tool_calls=CALLS), RESULT, assistant("It is fine.")],
    "tools": [ASK, assistant(None, tool_calls=CALLS), RESULT, assistant("It is fine.")],
}
KINDS = {**PLAIN_KINDS, **THINKING_KINDS, **CALLING_KINDS, **OTHER_KINDS}

QWEN = ["qwen2_5", "qwen3", "qwen3_instruct_2507"]
TAKE_THINKING = ["smollm2", "llama3", "llama3_1", "llama3_2", "deepseek_r1_distill", *QWEN]
TAKE_CALLS = ["llama3_1", "llama3_2", "deepseek_r1_distill", *QWEN]  # the others' templates leave calls out
REFUSALS = re.compile(
    r"(tools\[\d\]|messages\[\d\]\.(tool_calls\[\d\]|content|reasoning_content)).* leaves it out"
    r"|messages: the chat template refuses them: System role not supported"
    r"|messages\[\d\]: the chat template renders the turn in another way than its generation prompt"
)

OTHER_THINKING = re.compile(  # than the generation prompt leaves to the turn
    r"(response|messages\[\d\]) (answers inside the think block|thinks, and the generation prompt has closed"
    r"|closes thinking with </think> that neither)"
)


def conversation(kind: str) -> Conversation:
    return Conversation(messages=KINDS[kind], tools=TOOLS if kind == "tools" else None)


def texts_of(message: Message) -> list[str]:
    content = message["content"] or ""
    parts = [content] if isinstance(content, str) else [part["text"] for part in content]
    thinking = message.get("reasoning_content", "")
    calls = ["get_weather", "city", "Paris", "days", "17"] if message.get("tool_calls") else []
    # A generation prompt may have opened the thinking: the tag is not the policy's then.
    bare = [text.strip().removeprefix("<think>").strip() for text in (*parts, thinking)]
    return [text for text in bare if text] + calls


def sampled_places(messages: list[Message]) -> list[int]:
    return [
        k
        for k, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("weight", 1) and texts_of(message)
    ]


def runs(encoded: Encoded) -> list[list[int]]:
    """The decisions, those without anything between them together."""
    pairs = zip(encoded.loss_mask, encoded.input_ids, strict=True)
    return [[token for _, token in run] for decision, run in groupby(pairs, lambda pair: pair[0]) if decision]


def engine_prompt(tokenizer: Any, messages: list[Message], tools: Any) -> list[int] | None:
    """Ids that transformers renders, contents and arguments as the template takes them; None where it cannot."""
    bare = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    needed = [text for message in bare if message["role"] != "assistant" for text in texts_of(message)]
    needed += ["get_weather" for message in bare if message.get("tool_calls")]
    for change in (as_strings, as_parts):
        try:
            text = tokenizer.apply_chat_template(
                change(bare), tools=tools, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # whatever a template does with what it cannot take
            continue
        if all(want in text or json.dumps(want) in text for want in needed) and "'type'" not in text:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return None


def thinking_apart(messages: list[Message]) -> list[Message]:
    """Thinking that stands in <think>...</think> moved into a field, under the names that templates read."""
    moved = []
    for message in messages:
        thinking, found, answer = str(message["content"]).partition("</think>")
        if found:
            text = thinking.removeprefix("<think>").strip()
            message = {**message, "content": answer.strip(), "reasoning_content": text, "thinking": text}
        moved.append(message)
    return moved


def as_strings(messages: list[Message]) -> list[Message]:
    return [
        {**m, "content": "".join(p["text"] for p in m["content"])} if isinstance(m["content"], list) else m
        for m in messages
    ]


def as_parts(messages: list[Message]) -> list[Message]:
    strings = as_strings(messages)
    return [{**m, "content": [{"type": "text", "text": m["content"] or ""}]} for m in strings]


def tried(encoder: ChatEncoder, kind: str) -> tuple[list[Encoded], str]:
    """(trajectories, "") or ([], why the row is refused)."""
    try:
        return encoder.encode(conversation(kind)), ""
    except RowProblem as problem:
        return [], str(problem)


def check(name: str, kind: str, families: Families) -> None:
    """What holds for every conversation that is accepted."""
    tokenizer, messages = families(name), KINDS[kind]
    encoder = ChatEncoder(tokenizer, multi_turn="split")
    split = encoder.encode(conversation(kind))
    places = sampled_places(messages)
    assert len(split) == len(places)
    for encoded, place in zip(split, places, strict=True):
        (decisions,) = runs(encoded)
        context = encoded.input_ids[: -len(decisions)]
        assert not any(encoded.loss_mask[: len(context)]), "decisions stand behind the context"
        text = tokenizer.decode(decisions)
        for part in "</think>".join(texts_of(messages[place])).split("</think>"):
            assert part.strip() in text, "a turn's text is in its decisions"
        for other in messages:
            if other["role"] != "assistant":
                assert not any(part in text for part in texts_of(other)), (
                    "no other role's text is in a decision"
                )
        assert decisions[-1] in encoder.special_ids, "the last decision ends the turn"
        tools = TOOLS if kind == "tools" else None
        prompt = engine_prompt(tokenizer, messages[:place], tools)
        apart = engine_prompt(tokenizer, thinking_apart(messages[:place]), tools)
        # DeepSeek's templates take calls with arguments as text and `content` null only, which transformers drops.
        cannot = name.startswith("deepseek") and kind in (*CALLING_KINDS, "text and call")
        assert context in (prompt, apart) or (prompt is None and cannot), "the context is an engine's"
    for multi_turn in ("auto", "whole"):
        encodings, problem = tried(ChatEncoder(tokenizer, multi_turn=multi_turn), kind)  # type: ignore[arg-type]
        assert not problem or (multi_turn == "whole" and "data.multi_turn=split" in problem)
        assert problem or [run for one in encodings for run in runs(one)] == [
            run for one in split for run in runs(one)
        ]


@pytest.mark.parametrize("name", ["smollm2", *templates()])
def test_every_conversation_is_as_it_was_sampled_or_refused(name: str, families: Families) -> None:
    for kind in KINDS:
        _, problem = tried(ChatEncoder(families(name)), kind)
        if not problem:
            check(name, kind, families)
            continue
        if OTHER_THINKING.match(problem):
            prompt = families(name).decode(engine_prompt(families(name), PLAIN[:1], None))
            assert prompt.rstrip().endswith("</think>")
            continue
        if "stands behind the result of the call" in problem:
            assert (kind, "gemma" in name) == ("text and call", True)
            continue
        assert kind not in PLAIN_KINDS, problem
        assert kind not in THINKING_KINDS or name not in TAKE_THINKING, problem
        assert kind not in CALLING_KINDS or name not in TAKE_CALLS, problem
        assert REFUSALS.match(problem), problem


RESPONSES = (
    "Lima.",
    " Lima. \n",
    "hm\n</think>\n\nLima.",
    "<|channel|>final<|message|>Lima.",
    " to=user<|message|>Lima.",
)


@pytest.mark.parametrize("name", ["smollm2", *templates()])
def test_response_is_what_it_is_in_every_template(name: str, families: Families) -> None:
    tokenizer = families(name)
    encoder = ChatEncoder(tokenizer)
    ask = [user("Capital of Peru?")]
    prompt = engine_prompt(tokenizer, ask, None)
    taken = []
    for response in RESPONSES:
        try:
            (encoded,) = encoder.encode(Conversation(prompt="Capital of Peru?", response=response))
        except RowProblem as problem:
            assert OTHER_THINKING.match(str(problem)) or "response has no '<|" in str(problem)
            continue
        taken.append(response)
        (decisions,) = runs(encoded)
        assert encoded.input_ids[: -len(decisions)] == prompt
        ended = tokenizer.decode(decisions)
        assert ended.startswith(response)
        (again,) = encoder.encode(Conversation(prompt=ask, response=ended))
        assert again == encoded
        (cut,) = encoder.encode(Conversation(prompt=ask, response=response, truncated=True))
        assert tokenizer.decode(runs(cut)[0]) == response
    assert taken


PAIRS = [
    "llama3",
    "qwen2_5",
    "gemma",
    "gemma3",
    "phi3_5",
    "cohere",
    "cohere2",
    "qwen3_instruct_2507",
    "deepseekv3",
]


@pytest.mark.parametrize("name", PAIRS)
def test_template_with_marks_gives_the_decisions_of_the_one_without(name: str, families: Families) -> None:
    for kind in PLAIN_KINDS:
        plain, marked = (
            [run for one in tried(ChatEncoder(families(each)), kind)[0] for run in runs(one)]
            for each in (name, f"{name}_training")
        )
        assert plain == marked
