"""Options of several commands about rows of text: how a conversation becomes tokens."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import typer

MultiTurnOption = Annotated[
    Literal["auto", "whole", "split"] | None,
    typer.Option(
        "--multi-turn",
        help="conversations of several turns: one trajectory (whole), one per assistant turn (split), or whole "
        "where the chat template lets the contexts agree (auto, the default)",
        show_default=False,
    ),
]
ChatTemplateOption = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        metavar="FILE",
        help="Jinja chat template instead of the tokenizer's own",
        show_default=False,
    ),
]
ChatTemplateKwargsOption = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        metavar="JSON",
        help="its arguments for all rows, such as '{\"enable_thinking\": false}'",
        show_default=False,
    ),
]


def text_settings(
    multi_turn: str | None, chat_template: str | None, chat_template_kwargs: str | None
) -> dict[str, Any]:
    """The options that are given, as keys of a recipe's ``data:`` section."""
    from pear_megatron.errors import RecipeError

    settings: dict[str, Any] = {}
    if multi_turn is not None:
        settings["multi_turn"] = multi_turn
    if chat_template is not None:
        settings["chat_template"] = chat_template
    if chat_template_kwargs is not None:
        try:
            kwargs = json.loads(chat_template_kwargs)
        except ValueError as error:
            raise RecipeError(
                f"--chat-template-kwargs {chat_template_kwargs!r} is no JSON ({error}); write an object, "
                'for example {"enable_thinking": false}'
            ) from error
        if not isinstance(kwargs, dict):
            raise RecipeError(f"--chat-template-kwargs {chat_template_kwargs!r} is no JSON object, {{...}}")
        settings["chat_template_kwargs"] = kwargs
    return settings
