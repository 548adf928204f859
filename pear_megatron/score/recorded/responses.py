"""Answers of OpenAI's Responses API: log-probs stand at the text parts of its messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import short
from pear_megatron.score.recorded.answers import Answer, Recorded, gives_whole, rows_of
from pear_megatron.score.recorded.openai import read_content
from pear_megatron.score.recorded.request import Request
from pear_megatron.score.recorded.tokens import Tokens

_FORMAT = "OpenAI Responses"
_INSTEAD = "generate with chat completions and return_token_ids, or score with --model"

FIELDS = (
    *("output", "input", "instructions", "status", "incomplete_details", "usage", "object", "created_at"),
    *("completed_at", "previous_response_id", "reasoning", "text", "tool_choice", "parallel_tool_calls"),
    *("truncation", "store", "background", "user", "service_tier", "max_output_tokens", "top_logprobs"),
    *("include", "rewards"),
)


def is_answer(body: Mapping[str, Any]) -> bool:
    """Whether it is an answer of the Responses API."""
    return body.get("object") == "response" or isinstance(body.get("output"), list)


def read(fields: Mapping[str, Any], body: Mapping[str, Any], tokens: Tokens) -> list[Recorded]:
    """See ``ordinary_fields``; ``body`` is the answer in the row, or the row itself."""
    request = _request(fields, body)
    if gives_whole(fields, request):
        raise RowProblem(
            f"{_FORMAT}: its log-probs are those of what was generated; give the request's messages alone"
        )
    answer = _answer(body)
    try:
        return rows_of(
            fields, request, [answer], tokens, identity=body.get("id"), generator=body.get("model")
        )
    except RowProblem as problem:
        raise RowProblem(f"{_FORMAT}: {problem}") from problem


def _request(fields: Mapping[str, Any], body: Mapping[str, Any]) -> Request:
    """The request in the row, with the instructions and reasoning effort that the answer echoes, if they agree."""
    echoed = {name: body[name] for name in ("instructions", "reasoning") if body.get(name) is not None}
    request = Request.of({**echoed, **{name: value for name, value in fields.items() if value is not None}})
    if request.ids is not None:
        return request
    before = body.get("previous_response_id") or fields.get("previous_response_id")
    if before is not None and fields.get("messages") is None:
        raise RowProblem(
            f"{_FORMAT}: previous_response_id = {short(before)}: the answer continues another one, which is not in the "
            "row; give the whole conversation as messages"
        )
    if body.get("tools") and not request.context.get("tools"):
        raise RowProblem(
            f"{_FORMAT}: response.tools = {short(body['tools'])}, but the row's request has none, and its prompt would "
            "lack them; give them as tools, in the form that the chat template takes"
        )
    instructions = echoed.get("instructions")
    if instructions is not None and not any(
        isinstance(message, Mapping) and message.get("content") == instructions
        for message in request.messages or []
    ):
        raise RowProblem(
            f"{_FORMAT}: response.instructions = {short(instructions)} are not in the row's request; put them first, "
            "as a message of role system"
        )
    return request


def _answer(body: Mapping[str, Any]) -> Answer:
    message, place = _message(body)
    parts = message.get("content")
    if not isinstance(parts, list) or not parts:
        raise RowProblem(
            f"{_FORMAT}: {place}.content = {short(parts)}; it must be a list of output_text, not empty"
        )
    texts = ""
    recorded: list[str] = []
    values: list[float | None] = []
    for j, part in enumerate(parts):
        name = f"{place}.content[{j}]"
        if (
            not isinstance(part, Mapping)
            or part.get("type") != "output_text"
            or not isinstance(part.get("text"), str)
        ):
            raise RowProblem(f"{_FORMAT}: {name} = {short(part)} is no output_text; drop the row")
        if not part.get("logprobs"):
            raise RowProblem(
                f"{_FORMAT}: {name}.logprobs is missing: ask with include=['message.output_text.logprobs'], or score "
                "with --model"
            )
        _, part_tokens, part_values = read_content(part["logprobs"], f"{name}.logprobs")
        texts, recorded, values = texts + part["text"], recorded + part_tokens, values + part_values
    usage = body.get("usage") or {}
    return Answer(
        place=f"{place}.content[].logprobs",
        logprobs=values,
        tokens=recorded,
        message={"role": "assistant", "content": texts},
        finish_reason=_finish_reason(body),
        counts=(
            ("usage.input_tokens", usage.get("input_tokens")),
            ("usage.output_tokens", usage.get("output_tokens")),
        ),
    )


def _message(body: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The one message of the answer; RowProblem if other things were generated before or after it."""
    output = body.get("output")
    if not isinstance(output, list) or not all(isinstance(item, Mapping) for item in output):
        raise RowProblem(
            f"{_FORMAT}: output = {short(output)}; it must be the list of items, as the server wrote it"
        )
    details = (body.get("usage") or {}).get("output_tokens_details") or {}
    kinds = [item.get("type") for item in output]
    if "reasoning" in kinds or details.get("reasoning_tokens"):
        raise RowProblem(
            f"{_FORMAT}: the answer has reasoning, which its log-probs do not cover (usage: "
            f"{details.get('reasoning_tokens', 'unknown')} tokens); the response is not whole without it: {_INSTEAD}"
        )
    if "function_call" in kinds:
        raise RowProblem(
            f"{_FORMAT}: the answer has tool calls, which its log-probs do not cover: {_INSTEAD}"
        )
    if kinds != ["message"]:
        raise RowProblem(f"{_FORMAT}: output has {kinds}, and only one message can be read: {_INSTEAD}")
    return output[0], "output[0]"


def _finish_reason(body: Mapping[str, Any]) -> str | None:
    status = body.get("status")
    if status == "incomplete":
        return (body.get("incomplete_details") or {}).get("reason") or "length"
    if status not in (None, "completed"):
        raise RowProblem(
            f"{_FORMAT}: status = {short(status)}; only completed and incomplete answers can be read"
        )
    return status
