"""What goes into the encoder, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conversation:
    """A text row: ``messages``, or ``prompt`` and ``response``.

    Attributes:
        messages: list of {role, content, ...} as it stands in the row; ShareGPT's {from, value} too.
        prompt: the user's words, or a list of messages.
        response: what the policy sampled after it, as it stands.
        system: the system message, where it does not stand among the messages.
        tools: JSON schemas of the functions that the policy could call.
        documents: list of {title, text}, for templates of retrieval models.
        chat_template_kwargs: arguments of the template (``enable_thinking``, ...), over the encoder's own.
        truncated: the (last) response was cut off, no token ends it.
    """

    messages: Any = None
    prompt: Any = None
    response: str | None = None
    system: str | None = None
    tools: Any = None
    documents: Any = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    truncated: bool = False


@dataclass(frozen=True)
class Encoded:
    """Tokens of one trajectory.

    Attributes:
        input_ids: the context and what was sampled in it.
        loss_mask: True on decisions, the tokens that the policy sampled.
        turn: number of the assistant turn, from 0, if the conversation was split into its turns; else None.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    turn: int | None = None
