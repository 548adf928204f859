"""Log-probs that the generator recorded: rows of vLLM, OpenAI-compatible servers and NeMo-RL as ordinary rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import check_names
from pear_megatron.score.recorded import nemo_rl, openai
from pear_megatron.score.recorded.tokens import Tokens

_OWN_FIELDS = ("tokenizer_hash", "temperature", "metadata")


def ordinary_fields(fields: Mapping[str, Any], tokens: Tokens) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields as the loader knows them, what else is worth keeping) of a row with recorded log-probs.

    The first has input_ids, loss_mask and behavior_logprobs, aligned; the second goes into the metadata.

    Args:
        fields: the row as it stands in the file.
        tokens: the tokenizer, for rows without token ids.

    Raises:
        RowProblem: no known form, or log-probs that cannot be aligned with the tokens for certain.
    """
    _check_temperature(fields)
    try:
        found, notes = _read(fields, tokens)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise RowProblem(
            f"the recorded log-probs are not in the form they should have ({type(error).__name__}: {error}); "
            "write the server's answer as it came"
        ) from error
    return {name: fields[name] for name in _OWN_FIELDS if name in fields} | found, notes


def _read(fields: Mapping[str, Any], tokens: Tokens) -> tuple[dict[str, Any], dict[str, Any]]:
    if "message_log" in fields:
        return nemo_rl.from_message_log(fields)
    if "generation_logprobs" in fields:
        return nemo_rl.from_train_data(fields)
    if openai.is_response(fields):
        return openai.from_response(fields, tokens)
    if "behavior_logprobs" in fields:
        check_names(fields)
        return {name: value for name, value in fields.items() if name != "policy_logprobs"}, {}
    raise RowProblem(
        f"no recorded log-probs among the fields {', '.join(fields)}; known are a response with choices "
        "and logprobs (vLLM, OpenAI-compatible servers), prompt_logprobs (vLLM), message_log or token_ids "
        "with generation_logprobs (NeMo-RL), and behavior_logprobs. Without any, score with --model"
    )


def _check_temperature(fields: Mapping[str, Any]) -> None:
    if fields.get("temperature", 1) != 1:
        raise RowProblem(
            f"temperature = {fields['temperature']!r}: log-probs must be those at temperature 1. Recorded ones "
            "are that only if the server logs raw ones (vLLM's logprobs_mode raw_logprobs, its default): if it "
            "does, write 1 here; if it logs processed ones, score with --model instead of importing"
        )
