"""From a row as it stands in the file to its trajectories, or to a sentence that says what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from pear_megatron.data.behavior import looks_half, read_logprobs
from pear_megatron.data.chat import Conversation
from pear_megatron.data.columns import NO_COLUMNS, REFERENCE, TOPK_IDS, TOPK_LOGPROBS, Columns, Need
from pear_megatron.data.config import DataConfig
from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import (
    check_encodable,
    get_flag,
    get_integers,
    get_mask,
    get_nullable_floats,
    get_number,
    get_text,
    get_token_weights,
    vocabulary,
)
from pear_megatron.data.files import Row
from pear_megatron.data.names import UnreadFields, form_of, unread_names
from pear_megatron.data.text import TextReader, Tokenized, conversation_of
from pear_megatron.data.topk import TopK, read_behavior_topk
from pear_megatron.data.trajectory import Trajectory

_TOPK_WAY_OUT = (
    "pear.base_loss=kl compares with it; write it with `pear-megatron score --top-k 64`, or set "
    "pear.base_loss=nll"
)

IDS_WITHOUT_END = "rows of ids that do not end with an end token and are not marked truncated"


class Validator:
    """Checks rows and makes trajectories of them (docs/method.md, Where it goes wrong).

    Args:
        config: the recipe's ``data:`` section.
        require_behavior_logprobs: False for plain SFT, where missing ones become zeros; None = all rows have them or
            none has.
        columns: what else is read.
        vocab_size: true size of the model's vocabulary; None takes the tokenizer's, if there is one.
        tokenizer: a fast Hugging Face tokenizer; text rows need it.

    Attributes:
        columns: as given.
        counts: ``trajectories``, ``dropped_truncated``, ``dropped_overlong``, ``half_precision``, and of
            trajectories that have any ``token_weights``, ``behavior_topk`` and ``reference_logprobs``; of rows that
            are split into their turns ``split_rows``, ``split_trajectories``, ``split_tokens`` and
            ``split_whole_tokens``, what one rendering of each would be.
        tokenizer_hash: of the tokenizer and chat template, or else the one that the rows carry, or None.
        encoder: what tokenises text rows; None without a tokenizer.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        require_behavior_logprobs: bool | None = True,
        columns: Columns = NO_COLUMNS,
        vocab_size: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        self._config = config
        self._required = require_behavior_logprobs
        self.columns = columns
        self._text = TextReader(config, tokenizer)
        self._vocab_size = len(tokenizer) if vocab_size is None and tokenizer is not None else vocab_size
        self._first_use: dict[str, str] = {}
        # Of a column: whether the first row has it, and its place.
        self._first_row: dict[str, tuple[bool, str]] = {}
        self.tokenizer_hash = self._text.tokenizer_hash
        self.encoder = self._text.encoder
        self._notes: Counter[str] = Counter()
        self._unread = UnreadFields()
        self._rows: Counter[bool] = Counter()  # with a reward, and without
        self.counts: Counter[str] = Counter(
            trajectories=0, dropped_truncated=0, dropped_overlong=0, half_precision=0
        )

    @property
    def notes(self) -> dict[str, int]:
        """What the user should know of the rows, and how many times it happened."""
        notes = {**self._text.notes, **self._notes, **self._unread.note}
        if all(self._rows[has] for has in (True, False)):
            notes["rows without a reward, which count as 1, beside rows with one"] = self._rows[False]
        return notes

    def __call__(self, row: Row) -> list[Trajectory]:
        """The row's trajectories, none if a policy drops them; RowProblem if the row is wrong."""
        fields = row.fields
        unread = unread_names(fields)
        self._unread.add(unread)
        identity = self._identity(row)
        required = self._required
        if required is None:
            required = self._has(row, "behavior_logprobs", "if_there")
        self._check_origin(fields, required)
        form = form_of(fields, unread)
        if get_flag(fields, "truncated") and self._drops_truncated():
            self.counts["dropped_truncated"] += 1
            return []
        reward = get_number(fields, "reward", 1.0)
        self._rows["reward" in fields] += 1
        conversation = None if form[0] == "input_ids" else conversation_of(fields, form)
        if conversation is None:
            parts = [Tokenized(get_integers(fields, "input_ids"), get_mask(fields, "loss_mask"))]
        else:
            parts = self._text.encode(conversation, form[0])
        for part in parts:
            self._check_tokens(part.input_ids, part.loss_mask)
        if conversation is None:
            self._note_end(parts[0], fields)
        self._count_split(parts)
        kept = [part for part in parts if not self._is_overlong(part, form)]
        if not kept:
            return []
        numbers = self._numbers(row, form, conversation, kept, required)
        weights = get_token_weights(fields, kept[0].loss_mask)
        if weights is not None and (weights[kept[0].loss_mask] == 1).all():
            weights = None
        self.counts["trajectories"] += len(kept)
        self.counts["token_weights"] += weights is not None
        found = []
        for part, (behavior, topk, reference) in zip(kept, numbers, strict=True):
            name = identity if part.turn is None else f"{identity}#{part.turn}"
            if "id" in fields and part.turn is not None:
                self._check_unique(name, row.where)
            self.counts["half_precision"] += looks_half(behavior[part.loss_mask])
            self.counts["behavior_topk"] += topk is not None
            self.counts[REFERENCE] += reference is not None
            ids = part.input_ids.astype(np.int32)
            found.append(
                Trajectory(
                    name,
                    ids,
                    part.loss_mask,
                    behavior,
                    reward,
                    weights,
                    behavior_topk=topk,
                    reference_logprobs=reference,
                )
            )
        return found

    def _identity(self, row: Row) -> str:
        value = row.fields.get("id", row.where)
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise RowProblem(f"id = {value!r} is a {type(value).__name__}; it must be a string")
        check_encodable("id", str(value))
        if "id" in row.fields:
            self._check_unique(str(value), row.where)
        return str(value)

    def _check_unique(self, identity: str, where: str) -> None:
        first = self._first_use.setdefault(identity, where)
        if first != where:
            raise RowProblem(f"id = {identity!r} is duplicated: {first} has it too; make ids unique")

    def _check_origin(self, fields: Mapping[str, Any], required: bool) -> None:
        temperature = get_number(fields, "temperature", 1.0)
        if required and temperature != 1.0:
            raise RowProblem(
                f"temperature = {temperature:g}: behavior_logprobs must be those of the policy at "
                "temperature 1, as the model's in training are; score them again with `pear-megatron score`"
            )
        if "tokenizer_hash" not in fields:
            return
        found = get_text(fields, "tokenizer_hash")
        check_encodable("tokenizer_hash", found)
        if self.tokenizer_hash is None:
            self.tokenizer_hash = found
        if found != self.tokenizer_hash:
            raise RowProblem(
                f"tokenizer_hash = {found!r}, but {self._text.origin} has {self.tokenizer_hash!r}: a foreign "
                "tokenizer, chat_template or chat_template_kwargs made these token ids; use those (data.tokenizer, "
                "data.chat_template, data.chat_template_kwargs), or tokenise and score the data again"
            )

    def _drops_truncated(self) -> bool:
        policy = self._config.truncated
        if policy == "error":
            raise RowProblem(
                "truncated = True: the response lost its suffix, and with it its weights; drop the row, or "
                "set data.truncated=drop"
            )
        return policy == "drop"

    def _is_overlong(self, part: Tokenized, form: tuple[str, ...]) -> bool:
        n = len(part.input_ids)
        if n - 1 <= self._config.seq_length:
            return False
        if self._config.overlong == "error":
            turn = "" if part.turn is None else f", assistant turn {part.turn},"
            raise RowProblem(
                f"{form[0]}{turn} has {n} tokens, over-long for data.seq_length = {self._config.seq_length}, which "
                f"holds {self._config.seq_length + 1}; raise it, or set data.overlong=drop (a cut response would "
                "lose the suffix its weights come from)"
            )
        self.counts["dropped_overlong"] += 1
        return True

    def _note_end(self, part: Tokenized, fields: Mapping[str, Any]) -> None:
        last = part.input_ids[part.loss_mask][-1]
        if self.encoder is None or get_flag(fields, "truncated") or int(last) in self.encoder.special_ids:
            return
        self._notes[IDS_WITHOUT_END] += 1

    def _count_split(self, parts: list[Tokenized]) -> None:
        if len(parts) > 1:
            self.counts["split_rows"] += 1
            self.counts["split_trajectories"] += len(parts)
            self.counts["split_tokens"] += sum(len(part.input_ids) for part in parts)
            self.counts["split_whole_tokens"] += len(parts[-1].input_ids)

    def _check_tokens(self, input_ids: np.ndarray, loss_mask: np.ndarray) -> None:
        if len(input_ids) != len(loss_mask):
            raise RowProblem(
                f"loss_mask has {len(loss_mask)} entries and input_ids {len(input_ids)}; write one per token"
            )
        vocab_size = self._vocab_size if self._vocab_size is not None else np.iinfo(np.int32).max
        outside = np.flatnonzero((input_ids < 0) | (input_ids >= vocab_size))
        if len(outside):
            i = outside[0]
            where = vocabulary(self._vocab_size)
            raise RowProblem(
                f"input_ids[{i}] = {input_ids[i]} is {where}; another tokenizer made it, or padding was left in"
            )
        if not loss_mask.any():
            raise RowProblem(
                f"loss_mask is all 0 over {len(loss_mask)} tokens (all masked, an empty response): there is "
                "no decision to learn from; drop the row, or mark the response with 1"
            )
        if loss_mask[0]:
            raise RowProblem(
                "loss_mask[0] = 1: token 0 has no context to be predicted from; put the prompt (or BOS) "
                "before the response and mark it 0"
            )

    def _numbers(
        self,
        row: Row,
        form: tuple[str, ...],
        conversation: Conversation | None,
        parts: list[Tokenized],
        required: bool,
    ) -> list[_Numbers]:
        """What policies gave the tokens of each part."""
        fields = row.fields
        read = (TOPK_IDS, TOPK_LOGPROBS, REFERENCE)
        names = [name for name in read if name not in self.columns.unread]
        given = [name for name in ("behavior_logprobs", *names, "policy_logprobs") if name in fields]
        whole = parts[0]
        if given and conversation is not None and parts[0].turn is not None:
            whole = self._text.whole(conversation, parts, given[0])
        source = "input_ids" if conversation is None else f"{form[0]}, as data.tokenizer encodes it,"
        behavior = read_logprobs(fields, whole.loss_mask, source, required=required)
        topk = self._topk(row, whole, behavior if "behavior_logprobs" in fields else None, source)
        reference = None
        need = self.columns.reference_logprobs
        if self._has(row, REFERENCE, need) or need == "required":
            reference = read_logprobs(fields, whole.loss_mask, source, required=True, name=REFERENCE)
        if "policy_logprobs" in given:  # for `inspect`: training computes them itself
            count = len(get_nullable_floats(fields, "policy_logprobs")[0])
            if count != len(whole.loss_mask):
                raise RowProblem(
                    f"policy_logprobs has {count} entries and {source} {len(whole.loss_mask)}; drop the field, or "
                    "write it again with `pear-megatron score --as policy`"
                )
        if parts[0].turn is None:
            return [(behavior, topk, reference)]
        if not given:
            return [(np.zeros(len(part.loss_mask), dtype=np.float32), None, None) for part in parts]
        return [_part(part.loss_mask, whole.loss_mask, behavior, topk, reference) for part in parts]

    def _topk(self, row: Row, whole: Tokenized, behavior: np.ndarray | None, source: str) -> TopK | None:
        fields, need = row.fields, self.columns.behavior_topk
        for name, other in ((TOPK_IDS, TOPK_LOGPROBS), (TOPK_LOGPROBS, TOPK_IDS)):
            if need != "no" and name in fields and other not in fields:
                raise RowProblem(f"missing field {other!r}: {name!r} does not come without it; add it")
        if self._has(row, TOPK_IDS, need):
            return read_behavior_topk(
                fields, whole.input_ids, whole.loss_mask, behavior, source, vocab_size=self._vocab_size
            )
        if need == "required":
            raise RowProblem(f"missing field {TOPK_IDS!r}: {_TOPK_WAY_OUT}")
        return None

    def _has(self, row: Row, name: str, need: Need) -> bool:
        """Whether a column is read and the row has it; unless it is required, all rows have it or none has."""
        here = name in row.fields
        if need == "if_there":
            first, where = self._first_row.setdefault(name, (here, row.where))
            if first != here:
                has, lacks = ("this row", where) if here else (where, "this row")
                raise RowProblem(
                    f"{name} is in some rows and not in others: {has} has it, {lacks} does not; write it for all rows "
                    "with `pear-megatron score`, or take it out of all"
                )
        return here and need != "no"


# (behavior_logprobs, behavior_topk, reference_logprobs) of a trajectory, as it has them.
_Numbers = tuple[np.ndarray, TopK | None, np.ndarray | None]


def _part(
    mask: np.ndarray, whole: np.ndarray, behavior: np.ndarray, topk: TopK | None, reference: np.ndarray | None
) -> _Numbers:
    """The numbers of a whole conversation on the decisions of a part that it begins with.

    Args:
        mask: bool [m], the part's decisions, which are decisions of the whole.
        whole: bool [n], m <= n.
        behavior, topk, reference: of the whole.
    """
    cut = [
        None if x is None else np.where(mask, x[: len(mask)], np.float32(0)) for x in (behavior, reference)
    ]
    own = np.flatnonzero(whole)
    chosen = np.isin(own, np.flatnonzero(mask))
    assert cut[0] is not None
    return cut[0], None if topk is None else topk.select(chosen), cut[1]
