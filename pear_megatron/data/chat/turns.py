"""What a policy wrote in one assistant turn, as text: everything behind the generation prompt, with its end of turn."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from pear_megatron.data.chat.ends import End
from pear_megatron.data.chat.fit import MOST_KNOWN, Fitter, stands_in
from pear_megatron.data.chat.messages import Message, is_assistant, parts_of, thinks_inline
from pear_megatron.data.chat.template import Setting
from pear_megatron.data.chat.text import common_prefix, overlap
from pear_megatron.data.errors import RowProblem

_USER: Message = {"role": "user", "content": "Zquserx"}
_THINKING, _CONTENT = "Zqthinkingx", "Zqcontentx"
_ROLE = re.compile(r"\s*(system|developer|user|human|assistant|tool)\b")
_OPENED = re.compile(r"\s*<think>\s*(</think>\s*)?")
_EMPTY_BLOCK = re.compile(r"^(\s*)<think>\s*</think>\s*")
_EMPTY_AT_END = re.compile(r"<think>\s*</think>\s*$")
_CLOSED_BLOCK = re.compile(r"^\s*</think>\s*")
THINK_TAGS = ("<think>", "</think>")
THINKING_LEFT_OPEN = (
    "answers without thinking inside the think block that the generation prompt opens, which they never close; a chat "
    "template that opens none (data.chat_template) would fit them"
)


THINKING_NOT_OPENED = (
    "answers that close a think block which neither they nor the generation prompt open; the chat template that they "
    "were sampled with opened one (data.chat_template)"
)
THINKING_CLOSED = (
    "answers that think behind a prompt that has closed thinking (chat_template_kwargs: enable_thinking)"
)


class TurnWriter:
    """Writes assistant turns with a chat template.

    The template is given words instead of the turn's texts, and the texts are put in their places: whatever it does
    to white space, tags or thinking, the texts stay as the policy wrote them.

    Args:
        fitter: renders with the template.
        ends: of a turn of text, and of one with tool calls.
        stops: every token at which sampling may have stopped.
        tokens: every token that a template may put around a text.
        notes: counts what the user should be told.
    """

    def __init__(
        self,
        fitter: Fitter,
        ends: tuple[End, End],
        stops: Iterable[str],
        tokens: Iterable[str],
        notes: Counter[str],
    ) -> None:
        self._fitter = fitter
        self._ends = ends
        self._stops = tuple(stops)
        self._tokens = tuple(tokens)
        self._around: tuple[dict[str, bool], str] | None = None
        self._notes = notes
        self._known: dict[str, str] = {}

    def write(self, message: Message, where: str, setting: Setting, context: str, *, truncated: bool) -> str:
        """What the policy wrote after ``context``, a text that ends with the generation prompt.

        Raises:
            RowProblem: the template has no place for a part of the turn, or the turn holds its end in its middle.
        """
        for part in parts_of(message, where):
            check_stops(part.text, part.name, self._stops)
        thinking, content = message.get("reasoning_content", ""), message["content"]
        written = self._rendered(message, where, setting)
        if thinking and written.count(_THINKING) != 1:
            if self._fitter.template.thinks_in_fields:
                raise RowProblem(
                    f"{where}.reasoning_content: the chat template leaves it out in this turn; write the thinking into "
                    "the content, as the policy did, or give prompt+response"
                )
            self._notes[
                "thinking written as <think>...</think>, for which the chat template has no place"
            ] += 1
            answer = self._rendered({**message, "reasoning_content": ""}, where, setting)
            answer = _CLOSED_BLOCK.sub("", _EMPTY_BLOCK.sub(r"\1", answer))
            space = answer[: len(answer) - len(answer.lstrip())]
            written = f"{space}<think>\n{_THINKING}\n</think>\n\n{answer.lstrip()}"
        if content.strip() and written.count(_CONTENT) != 1:
            raise RowProblem(f"{where}.content: the chat template leaves it out in this turn; change the row")
        head = written.partition(_CONTENT)[0]
        if twice := next((t for t in self._tokens if t in head and content.lstrip().startswith(t)), ""):
            raise RowProblem(
                f"{where}.content begins with {twice!r}, which the chat template writes before it; give the texts "
                "alone, content and reasoning_content, or prompt+response"
            )
        if not thinking:
            written = self._without_invented_thinking(written, content)
        written = self._ended(written, bool(message.get("tool_calls")), truncated)
        written = _put(_put(written, _THINKING, thinking), _CONTENT, content)
        for part in parts_of(message, where):
            if not stands_in(part.text, written):
                raise RowProblem(f"{part.name}: the chat template leaves it out in this turn; change the row")
        written = not_doubled(context, written)
        self._notes.update(check_thinking(context, written, where, truncated=truncated))
        return written

    def end_raw(self, response: str, field: str, *, truncated: bool) -> str:
        """A response with the token that ends a turn, unless it has it already or ``truncated``."""
        end = self._ends[0].text
        stop = next((stop for stop in self._stops if response.endswith(stop)), "")
        check_stops(response.removesuffix(stop), field, self._stops)
        return response if stop or truncated else response + end

    def check_beginning(self, response: str, field: str, setting: Setting) -> None:
        """RowProblem where the template begins every answer with a special token that the response lacks (gpt-oss)."""
        try:
            written = self._rendered({"role": "assistant", "content": _CONTENT}, field, setting)
        except RowProblem:  # it takes no single message of a user
            return
        header = written.partition(_CONTENT)[0].strip()
        first = next((token for token in self._tokens if header.startswith(token)), None)
        if first is not None and not response.lstrip().startswith(first):
            raise RowProblem(
                f"{field}: the chat template begins an answer with {header!r}, as the policy did; write the response "
                "as it was sampled, or give 'messages', which the template writes"
            )

    def length_of_end(self, written: str) -> int:
        """How many characters of a turn are its end."""
        return max((len(end.text) for end in self._ends if written.endswith(end.text)), default=0)

    def mark_of_rendering(self, prompt: str) -> str:
        """What tells that the template was put around a prompt already; empty where nothing does."""
        if self._around is None:
            try:
                text = self._fitter.render([_USER], Setting(), prompt=True)
            except RowProblem:  # it takes no single message of a user
                text = ""
            before, _, behind = text.rpartition(_USER["content"])
            opening = [token for token in self._tokens if token in before and token not in self._stops]
            # With a role behind it, as in <|im_start|>user; without one a prompt may be about <|im_start|>.
            named = {token: bool(re.search(re.escape(token) + "[a-z]", before)) for token in opening}
            self._around = named, behind.rstrip()
        opening_tokens, end = self._around
        start = prompt.lstrip()
        for token, role_follows in opening_tokens.items():
            if start.startswith(token) and (not role_follows or _ROLE.match(start, len(token))):
                return f"begins with {token!r}"
        if any(map(str.isalpha, end)) and prompt.rstrip().endswith(end):
            return f"ends with {end!r}"
        return ""

    def placed(self, messages: list[Message], setting: Setting) -> list[Message]:
        """The messages with thinking in the template's own place, where that is no <think> block."""
        if not any(thinks_inline(m["content"]) for m in messages if is_assistant(m)):
            return messages
        return [_with_thinking_apart(m) for m in messages] if self._thinks_elsewhere(setting) else messages

    def _thinks_elsewhere(self, setting: Setting) -> bool:
        """Whether the template has a place for thinking that is no <think> block (gpt-oss's analysis)."""
        if not self._fitter.template.thinks_in_fields:
            return False
        message = {"role": "assistant", "content": _CONTENT, "reasoning_content": _THINKING}
        try:
            written = self._rendered(message, "", setting)
        except RowProblem:
            return False
        return _THINKING in written and "think>" not in written

    def _rendered(self, message: Message, where: str, setting: Setting) -> str:
        """The turn after a user's, with words for its texts, from the generation prompt on."""
        message = dict(message)
        message["content"] = _with_its_space(message["content"], _CONTENT)
        if thinking := message.pop("reasoning_content", ""):
            message["reasoning_content"] = _with_its_space(thinking, _THINKING)
        key = repr((message, setting))
        if key not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            form = self._fitter.form([_USER, message], setting, prompt=False, places=["", where])
            through, _ = self._fitter.template.render(form([_USER, message]), setting)
            context = self._fitter.render([_USER], setting, prompt=True)
            self._known[key] = _behind(context, through, where)
        return self._known[key]

    def _without_invented_thinking(self, written: str, content: str) -> str:
        inline = thinks_inline(content)
        found = _EMPTY_BLOCK.match(written)
        if found and not inline:
            self._notes["empty think blocks of the chat template left out of turns without thinking"] += 1
        written = _EMPTY_BLOCK.sub(r"\1", written)
        if inline:
            return _CLOSED_BLOCK.sub("", written)
        if _CLOSED_BLOCK.match(written):
            self._notes[
                "turns without thinking that close the thinking which the generation prompt opens"
            ] += 1
        return written

    def _ended(self, written: str, calls: bool, truncated: bool) -> str:
        end = self._ends[calls]
        if truncated and not calls:
            last = max(
                (written.find(word) + len(word) for word in (_THINKING, _CONTENT) if word in written),
                default=0,
            )
            return written[:last]
        at = written.find(end.stop)
        written = written[: at + len(end.stop)] if at >= 0 else written.rstrip() + end.text
        return written.removesuffix(end.text) if truncated else written


def check_stops(text: str, name: str, stops: Iterable[str]) -> None:
    """RowProblem where a text holds a token at which sampling stops."""
    for stop in stops:
        if stop in text:
            raise RowProblem(
                f"{name} contains {stop!r}, the token that ends a turn: the policy would have stopped there; "
                "take it out of the text, or give input_ids+loss_mask as they were sampled"
            )


def check_thinking(context: str, written: str, name: str, *, truncated: bool) -> Iterator[str]:
    """Notes on what a turn does with think blocks.

    Args:
        context: a text that ends with the generation prompt.
        written: what follows it.
        name: the field that holds it.
        truncated: sampling was cut off, and may have been within a block.

    Raises:
        RowProblem: the turn opens a block and does not close it.
    """
    before, closed, _ = written.partition("</think>")
    if closed and "<think>" not in before and not context.rstrip().endswith("<think>"):
        yield THINKING_NOT_OPENED
    if not truncated and written.rfind("<think>") > written.rfind("</think>"):
        raise RowProblem(
            f"{name} opens a think block that it does not close, and would be trained to end there; mark the row "
            '"truncated": true, or drop it'
        )
    if _EMPTY_AT_END.search(context) and written.lstrip().startswith("<think>"):
        yield THINKING_CLOSED
    if not truncated and context.rstrip().endswith("<think>") and not closed:
        yield THINKING_LEFT_OPEN


def not_doubled(context: str, written: str) -> str:
    """``written`` without the tag at its start which the generation prompt has opened already."""
    start = written.lstrip()
    tail = context.rstrip()[-40:]
    for at in (match.start() for match in re.finditer("<", tail)):
        opened = tail[at:]
        if start.startswith(opened):
            rest = start.removeprefix(opened)
            space = context[len(context.rstrip()) :]
            return rest[overlap(space, rest) :]
    return written


def _with_thinking_apart(message: Message) -> Message:
    before, closed, answer = message["content"].partition("</think>")
    if not (closed and is_assistant(message) and before.lstrip().startswith("<think>")):
        return message
    return {
        **message,
        "reasoning_content": before.lstrip().removeprefix("<think>").strip(),
        "content": answer.lstrip(),
    }


def _behind(context: str, through: str, where: str) -> str:
    """What ``through`` has behind ``context``, the generation prompt of which it may render without its think tag."""
    if through.startswith(context):
        return through[len(context) :]
    same = len(common_prefix(context, through))
    if context.rfind("<", 0, same) > context.rfind(">", 0, same):  # within a tag
        same = context.rfind("<", 0, same)
    if context[same:].strip() and not _OPENED.fullmatch(context[same:]):
        raise RowProblem(
            f"{where}: the chat template renders the turn in another way than its generation prompt "
            f"({context[same:]!r}) begins it; check chat_template_kwargs, or give prompt+response"
        )
    return through[same:]


def _put(text: str, word: str, value: str) -> str:
    """The value in the word's place; white space that template and value both have there is not doubled."""
    before, found, after = text.partition(word)
    if not found:
        return text
    value = value[overlap(before[len(before.rstrip()) :], value) :]
    return before + value[: len(value) - overlap(value[len(value.rstrip()) :], after)] + after


def _with_its_space(text: str, word: str) -> str:
    """The word instead of the text, with the white space at the text's ends: what a template does to that is seen."""
    bare = text.strip()
    return text.replace(bare, word) if bare else text
