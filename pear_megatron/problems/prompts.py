"""Prompts as a model's tokenizer renders them: one way for evaluation and RL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pear_megatron.data.chat.ends import end_of_turn
from pear_megatron.data.errors import DataError, Problems, RowProblem
from pear_megatron.errors import EvalError
from pear_megatron.problems.problem import Messages, Problem


def as_tokenizer_takes_it(tokenizer: Any, problem: Problem) -> str | Messages:
    """Messages where the tokenizer has a chat template, else the string; DataError if that is not one."""
    prompt = problem.prompt
    if tokenizer.chat_template:
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if isinstance(prompt, str):
        return prompt
    raise DataError(
        f"{problem.where}: the prompt of {problem.id} is messages, and the model's tokenizer has no chat "
        'template; give a string (with reasoning_gym: system_prompt: "")'
    )


def encode_prompts(
    tokenizer: Any,
    problems: Sequence[Problem],
    max_new_tokens: int,
    limit: int | None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of each problem's prompt, up to where the response begins.

    Args:
        max_new_tokens: room that must be left for the response.
        limit: tokens that a prompt and its response may have; None = any number.

    Raises:
        DataError: the chat template refuses a prompt, or prompts are too long; each with its place.
    """
    from jinja2 import TemplateError

    encoded: list[list[int]] = []
    wrong = Problems()
    for problem in problems:
        prompt = as_tokenizer_takes_it(tokenizer, problem)
        try:
            if isinstance(prompt, str):
                ids = tokenizer(prompt)["input_ids"]
            else:
                ids = tokenizer.apply_chat_template(
                    prompt,
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    **(chat_template_kwargs or {}),
                )["input_ids"]
        except TemplateError as error:
            wrong.add(
                problem.where, f"the chat template refuses the prompt of {problem.id}: {error}; change it"
            )
            continue
        if isinstance(prompt, str) and ids and ids[-1] == tokenizer.eos_token_id:
            wrong.add(
                problem.where, "the tokenizer ends the prompt with EOS; load it with add_eos_token=False"
            )
        elif not ids:
            wrong.add(problem.where, f"the prompt of {problem.id} has no tokens; give it some text")
        elif limit is not None and len(ids) + max_new_tokens > limit:
            wrong.add(
                problem.where,
                f"the prompt of {problem.id} has {len(ids)} tokens, which with {max_new_tokens} new ones exceeds "
                f"the {limit} there may be; lower the new tokens or leave the problem out",
            )
        encoded.append(list(ids))
    wrong.raise_if_any()
    return encoded


def end_tokens(tokenizer: Any, generation_config: Any) -> list[int]:
    """Ids that end a response: the tokenizer's EOS, the chat template's end of turn, generation_config.json's."""
    try:
        by_template = end_of_turn(tokenizer)
    except RowProblem:  # a template for other rows than plain questions
        by_template = None
    named = getattr(generation_config, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    found = sorted({i for i in [tokenizer.eos_token_id, by_template, *ids] if i is not None})
    if not found:
        raise EvalError(
            "the model has no end token: neither its tokenizer nor generation_config.json names one"
        )
    return found
