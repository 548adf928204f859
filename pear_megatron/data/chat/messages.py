"""The messages of a row, whatever dialect they are written in, as one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pear_megatron.data.chat.keys import REASONING, check_call, check_keys
from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import short

Message = dict[str, Any]
# What servers write beside the content that no chat template reads, and the way out.
_UNREAD = {
    "function_call": "write one list of tool_calls",
    "refusal": "the policy's words go into the content",
    "audio": "only text can be trained on; drop the row",
}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant"), "assistant"),
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
# Other programs' names of roles that no chat template knows.
_ROLES = {
    **dict.fromkeys(("model", "ai", "gpt", "chatgpt", "bot", "assistant"), "assistant"),
    **dict.fromkeys(("human", "prompter", "user"), "user"),
    **dict.fromkeys(("observation", "tool"), "tool"),
    "system": "system",
}
_CONTENTS = ("text", "parts", "value", "message", "body")  # what other programs call the content
TEXT_PARTS = ("text", "input_text", "output_text")
_PARTS = {
    **dict.fromkeys(("thinking", "reasoning"), "write it into the message's 'reasoning_content'"),
    "tool_use": "write it into the message's 'tool_calls'",
    "tool_result": "write it as a message of role tool",
}


@dataclass(frozen=True)
class Part:
    """Text that must not vanish: where it stands in the row, the text, and whether it is an assistant's thinking."""

    name: str
    text: str
    thinking: bool = False


def read_messages(value: Any, field: str = "messages") -> list[Message]:
    """Messages with ``content`` a string, reasoning as ``reasoning_content``, arguments as dicts where they are JSON.

    Raises:
        RowProblem: no list of messages, or one with something in it that cannot become tokens.
    """
    if isinstance(value, str) and isinstance(_json(value), list):
        raise RowProblem(
            f"{field} is a list written as JSON text; parse it (json.loads), so that a list stands there"
        )
    if not isinstance(value, list) or not value:
        raise RowProblem(f"{field} = {short(value)}; it must be a list of {{role, content}}, not empty")
    if all(isinstance(_json(message), dict) for message in value):
        raise RowProblem(
            f"{field} is a list of JSON texts; parse each (json.loads), so that objects stand there"
        )
    return [_read_message(message, f"{field}[{k}]") for k, message in enumerate(value)]


def with_system(system: str | None, messages: Any) -> Any:
    """The messages behind the text of the column ``system``, unless they begin with it; RowProblem on another one."""
    if not system or not isinstance(messages, list):
        return messages
    roles = [one.get("role", one.get("from")) if isinstance(one, dict) else None for one in messages]
    own = [one for role, one in zip(roles, messages, strict=True) if role in ("system", "developer")]
    if not own:
        return [{"role": "system", "content": system}, *messages]
    text = own[0].get("content", own[0].get("value"))
    if own[0] is messages[0] and text == system:
        return messages
    raise RowProblem(
        f"system = {short(system)}, and the messages have {short(text)} as a system message of their own; keep one"
    )


def is_assistant(message: Message) -> bool:
    """Whether the policy wrote the message."""
    return bool(message["role"] == "assistant")


def is_empty(message: Message) -> bool:
    """Whether it has neither text nor thinking nor calls."""
    texts = (message["content"], message.get("reasoning_content", ""))
    return not any(text.strip() for text in texts) and not message.get("tool_calls")


def check_order(messages: list[Message], field: str = "messages") -> None:
    """RowProblem unless there is an assistant turn with something in it, after a prompt."""
    answers = [message for message in messages if is_assistant(message)]
    if not answers:
        roles = ", ".join(message["role"] for message in messages)
        raise RowProblem(f"{field} has no assistant turn (roles: {roles}): no decision; drop the row")
    if is_assistant(messages[0]) and messages[0]["weight"]:
        raise RowProblem(
            f'{field}[0] is an assistant turn without a prompt; begin with system or user, or give it "weight": 0'
        )
    if all(is_empty(answer) for answer in answers):
        raise RowProblem(f"{field}: every assistant turn is an empty response; drop the row")
    if not any(answer["weight"] for answer in answers if not is_empty(answer)):
        raise RowProblem(f"{field}: weight is 0 on every assistant turn with text: no decision; drop the row")


def parts_of(message: Message, where: str) -> Iterator[Part]:
    """Every text of the message, thinking inside the content apart; texts of nothing but white space left out."""
    inline, content = _split_thinking(message)
    for text, name, thinking in (
        (message.get("reasoning_content", ""), "reasoning_content", True),
        (inline, "content", True),
        (content, "content", False),
    ):
        if text.strip():
            yield Part(f"{where}.{name}", text, thinking)
    for i, call in enumerate(message.get("tool_calls", ())):
        function, place = call["function"], f"{where}.tool_calls[{i}].function"
        yield Part(f"{place}.name", function["name"])
        for leaf in leaves(function["arguments"]):
            yield Part(f"{place}.arguments", leaf)


def leaves(value: Any) -> Iterator[str]:
    """The texts in arguments, a dict or the text that they are; numbers, booleans and nulls as JSON."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    elif not isinstance(value, str):
        yield json.dumps(value)
    elif value.strip():
        yield value


def has_nulls(value: Any) -> bool:
    """Whether a null stands anywhere in objects and lists."""
    if isinstance(value, (dict, list)):
        return any(map(has_nulls, value.values() if isinstance(value, dict) else value))
    return value is None


def unseen_changes(message: Any) -> Iterator[str]:
    """What reading a message changes of it, or loses, as notes to the user.

    Args:
        message: as it stands in the row.
    """
    if not isinstance(message, dict):
        return
    parts = message.get("content")
    if isinstance(parts, list) and message.get("role") != "assistant" and sum(map(bool, parts)) > 1:
        yield "messages of several text parts, joined as they are (some engines put a line break between them)"
    for call in message.get("tool_calls") or [message.get("function_call")]:
        function = call.get("function", call) if isinstance(call, dict) else None
        text = function.get("arguments") if isinstance(function, dict) else None
        parsed = _json(text) if isinstance(text, str) else None
        if isinstance(parsed, dict) and text not in (
            json.dumps(parsed, ensure_ascii=False),
            json.dumps(parsed),
        ):
            yield "calls whose arguments, JSON text, are written anew: with other spaces or numbers than they had"


def thinks_inline(content: str) -> bool:
    """Whether thinking stands inside the content, with the tag that ends it."""
    return "</think>" in content


def _split_thinking(message: Message) -> tuple[str, str]:
    content: str = message["content"]
    if not is_assistant(message):
        return "", content
    thinking, tag, answer = content.rpartition("</think>")
    if tag:
        return thinking.strip().removeprefix("<think>"), answer
    return (content, "") if content.lstrip().startswith("<think>") else ("", content)


def _read_message(value: Any, where: str) -> Message:
    body = "content"
    if isinstance(value, dict) and "from" in value and "role" not in value:
        body, value = "value", _from_sharegpt(value, where)
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise RowProblem(f"{where} = {short(value)}; it must be an object with a role")
    if (role := value["role"]) not in _ROLES.values() and (meant := _ROLES.get(role.lower())):
        raise RowProblem(f"{where}.role = {short(role)}; write {meant!r}")
    calls = value.get("tool_calls")
    if not calls and isinstance(value.get("function_call"), dict):  # OpenAI's old form
        calls, value = [value["function_call"]], {**value, "function_call": None}
    message = _without_nulls({**value, "tool_calls": None})
    check_keys({**message, "tool_calls": calls}, where, body)
    for key, way_out in _UNREAD.items():
        if message.get(key):
            raise RowProblem(f"{where}.{key} = {short(message[key])} would be left out; {way_out}")
    for key in _CONTENTS:
        if not message.get("content") and message.get(key):
            raise RowProblem(f"{where}.{key} = {short(message[key])} would not be read; write it as {body!r}")
    message["content"] = _text(
        message.get("content"), f"{where}.content", needed=value["role"] != "assistant"
    )
    if thinking := _thinking(message, where):
        if value["role"] != "assistant":
            raise RowProblem(f"{where} has thinking and is no assistant's: it would be left out; take it out")
        if message["content"].lstrip().startswith("<think>"):
            raise RowProblem(f"{where} has thinking both in its content, as <think>, and beside it; keep one")
        message["reasoning_content"] = thinking
    if calls:
        if not isinstance(calls, list):
            raise RowProblem(f"{where}.tool_calls = {short(calls)}; it must be a list of calls")
        message["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    weight = message.pop("weight", 1)
    if weight not in (0, 1):
        raise RowProblem(
            f"{where}.weight = {short(weight)}; it is 0 or 1, other weights go into token_weights"
        )
    return {**message, "weight": int(weight)}


def _thinking(message: Message, where: str) -> str:
    found = {key: text for key in REASONING if (text := message.pop(key, None))}
    for key, text in found.items():
        if not isinstance(text, str):
            raise RowProblem(
                f"{where}.{key} = {short(text)} is a {type(text).__name__}; give the thinking as a text"
            )
    if len(set(found.values())) > 1:
        raise RowProblem(f"{where} has {' and '.join(found)} with different texts; keep one")
    return next(iter(found.values()), "")


def _from_sharegpt(value: Message, where: str) -> Message:
    sender = value["from"]
    if not isinstance(sender, str) or sender not in _SHAREGPT_ROLES:
        raise RowProblem(f"{where}.from = {short(sender)}; it is one of {', '.join(_SHAREGPT_ROLES)}")
    if value.get("value") is None and value.get("content"):
        raise RowProblem(
            f"{where}.content = {short(value['content'])} beside 'from' would not be read; write 'value'"
        )
    others = {key: inner for key, inner in value.items() if key not in ("from", "value")}
    message = {**others, "role": _SHAREGPT_ROLES[sender], "content": value.get("value")}
    if sender == "function_call":
        called, thinking = value.get("value"), None
        if isinstance(called, str):
            before, tag, rest = called.rpartition("</think>")
            called, thinking = _json(rest), before + tag
        calls = called if isinstance(called, list) else [called]
        if not all(isinstance(call, dict) for call in calls):
            raise RowProblem(
                f"{where}.value = {short(value.get('value'))}; a function_call is JSON: name, arguments"
            )
        message |= {"content": thinking, "tool_calls": calls}
    return message


def _text(value: Any, where: str, *, needed: bool) -> str:
    if isinstance(value, str):
        return value
    if value is None and not needed:
        return ""
    if value is None:
        raise RowProblem(f"{where} is missing; give a text, an empty one if the message has none")
    if not isinstance(value, list):
        raise RowProblem(
            f"{where} = {short(value)} is a {type(value).__name__}; give a text or a list of text parts"
        )
    texts = []
    for i, part in enumerate(value):
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if not isinstance(text, str) or kind not in TEXT_PARTS:
            way_out = _PARTS.get(kind, "only text can be trained on; drop the row")
            raise RowProblem(f"{where}[{i}] = {short(part)} is no text part; {way_out}")
        for name, beside in part.items() if isinstance(part, dict) else ():
            if name not in ("type", "text", "cache_control") and beside not in (None, [], {}, ""):
                raise RowProblem(
                    f"{where}[{i}].{name} = {short(beside)} would not be read; take it out of the text part"
                )
        texts.append(text)
    return "".join(texts)


def _call(value: Any, where: str) -> Message:
    call = value
    if isinstance(call, dict) and "function" not in call:  # {name, arguments} without the envelope
        call = {"function": call}
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem(f"{where} = {short(value)}; it must be {{type, function: {{name, arguments}}}}")
    check_call(call, function, where)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and not arguments.strip():
        arguments = None  # of a function without parameters
    parsed = _json(arguments) if isinstance(arguments, str) else arguments or {}
    if isinstance(parsed, dict) and isinstance(arguments, str) and _has_a_key_twice(arguments):
        raise RowProblem(
            f"{where}.function.arguments = {short(arguments)} has a key twice; keep the one that was meant"
        )
    function = {**_without_nulls(function), "arguments": parsed if isinstance(parsed, dict) else arguments}
    if not isinstance(function["arguments"], (dict, str)):
        raise RowProblem(f"{where}.function.arguments = {short(arguments)}; give an object, or its JSON")
    return {"type": "function", **_without_nulls(call), "function": function}


def _without_nulls(value: Message) -> Message:
    return {key: inner for key, inner in value.items() if inner is not None}


def _json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return None


def _has_a_key_twice(text: str) -> bool:
    objects: list[list[tuple[str, Any]]] = []
    json.loads(text, object_pairs_hook=objects.append)
    return any(len(dict(pairs)) != len(pairs) for pairs in objects)
