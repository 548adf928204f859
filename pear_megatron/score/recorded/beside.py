"""What stands beside a recorded answer: it is read, refused, or named at the end, never dropped unsaid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from pear_megatron.data.columns import REFERENCE, TOPK_IDS, TOPK_LOGPROBS
from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import FUNCTIONS, SYSTEM
from pear_megatron.data.names import UnreadFields, is_nearly
from pear_megatron.score.recorded.request import TEMPLATE_FIELDS
from pear_megatron.score.recorded.sampling import is_of_sampling

# Fields of a row that change what is learned, or that are checked, in whatever form the answer is.
OWN = (
    *("id", "custom_id", "reward", "truncated", "metadata", "tokenizer_hash", "temperature", "logprobs_mode"),
    *("messages", "prompt", "prompt_token_ids", "prompt_ids", "tools", "documents", "chat_template_kwargs"),
    *TEMPLATE_FIELDS,
    *("response", "request", "body", "method", "url", "error", "model", "max_tokens", "n", "seed", "stop"),
)
_REWARDS = ("reward", "rewards", "total_reward", "reward_score", "score", "token_level_scores", "rm_scores")
# Names whose misspelling would leave a row that reads well and means something else.
_MEANT = (
    *("reward", "truncated", "temperature", "tokenizer_hash", "logprobs_mode", "chat_template_kwargs"),
    *("token_weights", "behavior_logprobs", REFERENCE, "loss_mask", "attention_mask", "remove_sample"),
    *("total_reward", "reward_score", "token_level_scores", "token_loss_mask", "sample_loss_mask"),
)
# One number a token, of tokens that only the answer says.
_PER_TOKEN = ("token_weights", "behavior_logprobs", TOPK_IDS, TOPK_LOGPROBS, REFERENCE, "policy_logprobs")
CARRIED = ("token_weights", REFERENCE)  # by a row that gives its input_ids itself


class Remarks:
    """What the user should be told once about rows that were read, and of how many of them it is true."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.unread = UnreadFields()

    @property
    def notes(self) -> dict[str, int]:
        """Each remark with its number of rows."""
        return {**self.counts, **self.unread.note}


def unread_fields(
    fields: Mapping[str, Any], read: Collection[str], *, carried: Collection[str] = ()
) -> list[str]:
    """The names of a row with a recorded answer that are neither ``read`` nor the package's.

    Args:
        carried: columns of one number a token whose place the row says itself.

    Raises:
        RowProblem: a name that is nearly one of those, or a column that cannot be placed beside an answer.
    """
    known = {
        *read,
        *OWN,
        *_PER_TOKEN,
        FUNCTIONS,
        *(name for name in SYSTEM if isinstance(fields.get(name), str)),
    }
    check_spelling(fields, known)
    for name in _PER_TOKEN:
        if name not in fields or name in carried:
            continue
        if name == "behavior_logprobs":
            raise RowProblem(
                "behavior_logprobs beside a recorded answer: the row has its log-probs twice; keep one of the two"
            )
        raise RowProblem(
            f"{name} beside a recorded answer cannot be placed at its tokens; leave it out here, and add it to the "
            "file that `score` writes, which has the input_ids that it belongs to"
        )
    return [name for name in fields if name not in known and not is_of_sampling(name)]


def check_spelling(fields: Mapping[str, Any], read: Collection[str], place: str = "") -> None:
    """RowProblem on a name that is nearly one of ``read`` which changes what is learned, if that is not there."""
    meant = [name for name in _MEANT if name in read and name not in fields]
    if any(name in read and name in fields for name in _REWARDS):
        meant = [name for name in meant if name not in _REWARDS]
    for name in fields:
        if name in read:
            continue
        near = next((known for known in meant if is_nearly(str(name), known)), None)
        if near is not None:
            raise RowProblem(
                f"unknown field {place + name!r}; did you mean {near!r}? (anything of your own goes under 'metadata')"
            )


def check_inside(answer: Mapping[str, Any], place: str, read: Collection[str] = ()) -> None:
    """RowProblem on what belongs beside an answer and stands, well spelt or not, in the answer at ``place``."""
    beside = ("reward", "rewards", "truncated", *_PER_TOKEN)
    check_spelling(answer, {*read, *beside}, f"{place}.")
    for name in beside:
        if name in answer and name not in read and answer[name] is not None:
            raise RowProblem(f"{place}.{name} is not read there; put it beside the answer, on top of the row")
