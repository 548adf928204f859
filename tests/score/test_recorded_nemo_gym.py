"""NeMo-Gym's rollouts: items with prompt_token_ids, generation_token_ids and generation_log_probs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pear_megatron.data.errors import RowProblem
from tests.score.recorded_cases import LOGPROBS, MESSAGES, RESPONSE, TEXT, check_tokens, prompt_ids, read


def recorded(prompt: list[int]) -> dict[str, Any]:
    return {"prompt_token_ids": prompt, "generation_token_ids": RESPONSE, "generation_log_probs": LOGPROBS}


def message(prompt: list[int]) -> dict[str, Any]:
    content = [{"type": "output_text", "text": TEXT, "annotations": []}]
    return {"type": "message", "role": "assistant", "content": content, **recorded(prompt)}


def rollout(*output: dict[str, Any], **fields: Any) -> dict[str, Any]:
    asked = {"input": MESSAGES, "temperature": 1.0}
    response = {"object": "response", "created_at": 1, "output": list(output), "tools": []}
    return {"responses_create_params": asked, "response": response, "reward": 0.5, **fields}


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_a_rollout_of_one_answer(with_tokenizer: bool) -> None:
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
    (found,) = read(rollout(thought, message(prompt_ids())), with_tokenizer=with_tokenizer)
    check_tokens(found)
    assert found.trajectory.reward == 0.5


def test_turns_that_continue_one_another_are_one_trajectory() -> None:
    between = [5, 6, 7]
    call = {"type": "function_call", "name": "find", "arguments": "{}", **recorded(prompt_ids())}
    result = {"type": "function_call_output", "output": "4"}
    row = rollout(call, result, message(prompt_ids() + RESPONSE + between), id="a")
    row["responses_create_params"]["input"] = [*MESSAGES, call, result]  # no messages, and none are needed
    (found,) = read(row)
    mask = [False] * 36 + [True] * 11 + [False] * 3 + [True] * 11
    assert found.trajectory.input_ids.tolist() == [*prompt_ids(), *RESPONSE, *between, *RESPONSE]
    assert found.trajectory.loss_mask.tolist() == mask
    np.testing.assert_array_equal(
        found.trajectory.behavior_logprobs[np.array(mask)], np.float32(LOGPROBS * 2)
    )


def test_turns_in_other_contexts_are_trajectories_of_the_same_reward() -> None:
    row = rollout(message(prompt_ids()), message(prompt_ids()), id="a")
    row["response"]["incomplete_details"] = {"reason": "max_output_tokens"}
    first, second = read(row)
    check_tokens(first)
    check_tokens(second)
    assert (first.trajectory.id, second.trajectory.id) == ("a#0", "a#1")
    assert first.trajectory.reward == second.trajectory.reward == 0.5
    assert (first.truncated, second.truncated) == (None, True)


def test_chat_messages() -> None:
    said = {"role": "assistant", "content": TEXT, **recorded(prompt_ids())}
    (found,) = read({"messages": [*MESSAGES, said], "reward": 1})
    check_tokens(found)
    assert "generation_log_probs" not in (found.metadata or "")
    choice = {"message": said, "logprobs": None, "finish_reason": "length"}
    (found,) = read({"messages": MESSAGES, "response": {"choices": [choice]}})
    check_tokens(found)
    assert found.truncated is True


def test_what_is_damaged_is_refused() -> None:
    broken = message(prompt_ids())
    broken["generation_log_probs"] = LOGPROBS[1:]
    with pytest.raises(RowProblem, match=r"output\[0\]: generation_log_probs has 10 entries and .* 11"):
        read(rollout(broken))
    del broken["generation_log_probs"]
    with pytest.raises(
        RowProblem, match=r"output\[0\]\.generation_log_probs is missing .* score with --model"
    ):
        read(rollout(broken))
    broken["generation_log_probs"] = [*LOGPROBS[1:], None]
    with pytest.raises(RowProblem, match=r"behavior_logprobs\[46\]"):
        read(rollout(broken))
    other = message(prompt_ids())
    other["content"][0]["text"] = "Green"
    with pytest.raises(RowProblem, match="the answer's text 'Green' is not among its tokens"):
        read(rollout(other))
