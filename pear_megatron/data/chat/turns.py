"""What a policy wrote in one assistant turn, as text: everything behind the generation prompt, with its end of turn."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from pear_megatron.data.chat.ends import End, common_prefix
from pear_megatron.data.chat.fit import MOST_KNOWN, Fitter, stands_in
from pear_megatron.data.chat.messages import Message, is_assistant, parts_of, thinks_inline
from pear_megatron.data.chat.template import Setting
from pear_megatron.data.errors import RowProblem

_USER: Message = {"role": "user", "content": "Zquserx"}
_THINKING, _CONTENT, _RESULT, _NAME = "Zqthinkingx", "Zqcontentx", "Zqresultx", "Zqnamex"
_TAG = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")
_ROLE = re.compile(r"\s*(system|developer|user|human|assistant|tool)\b")
_OPENED = re.compile(r"\s*<think>\s*(</think>\s*)?")
_EMPTY_BLOCK = re.compile(r"^(\s*)<think>\s*</think>\s*")
_CLOSED_BLOCK = re.compile(r"^\s*</think>\s*")
THINK_TAGS = ("<think>", "</think>")
_INLINE = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_CLOSES = "turns without thinking that close the thinking which the generation prompt opens"
_IN_FIELD = "give it as messages, with the thinking in reasoning_content"


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
        self._writes_name: dict[str, bool] = {}

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
                f"{where}.content begins with {twice!r}, which the chat template writes before a content: it would "
                "stand there twice; give bare texts, content and reasoning_content, or prompt+response"
            )
        if message.get("tool_calls") and content.strip():
            self._check_text_beside_calls(message, where, setting, written)
        if not thinking:
            written = self._without_invented_thinking(written, content)
        written = self._ended(written, bool(message.get("tool_calls")), truncated)
        written = _put(_put(written, _THINKING, thinking), _CONTENT, content)
        for part in parts_of(message, where):
            if not stands_in(part.text, written):
                raise RowProblem(f"{part.name}: the chat template leaves it out in this turn; change the row")
        written = not_doubled(context, written)
        opened = context.rstrip().endswith("<think>") and "</think>" not in written
        if opened and not truncated and not thinking and not content.lstrip().startswith("<think>"):
            self._notes[_CLOSES] += 1
            written = f"\n</think>\n\n{written}"  # as the templates of Qwen3-2507 and others write it
        check_thinking(context, written, where, self._notes, truncated=truncated)
        return written

    def write_raw(self, response: str, field: str, setting: Setting, context: str, *, truncated: bool) -> str:
        """A response with the token that ends a turn, unless it has it already or ``truncated``."""
        response = not_doubled(context, response)
        self._check_start(response, field, setting)
        check_thinking(context, response, field, self._notes, truncated=truncated)
        end = self._ends[0].text
        stop = next((stop for stop in self._stops if response.endswith(stop)), "")
        check_stops(response.removesuffix(stop), field, self._stops)
        return response if stop or truncated else response + end

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

    def with_thinking_apart(self, messages: list[Message], setting: Setting) -> list[Message]:
        """The messages, thinking inside a content moved to the place of its own that the template may have."""
        return [self._apart(message) for message in messages] if self._thinks_apart(setting) else messages

    def _apart(self, message: Message) -> Message:
        found = _INLINE.fullmatch(message["content"])
        if not found or not is_assistant(message) or "reasoning_content" in message:
            return message
        self._notes["thinking in <think>...</think>, written where the chat template has thinking"] += 1
        thinking = {"reasoning_content": found[1].strip()} if found[1].strip() else {}
        return {**message, "content": found[2].lstrip(), **thinking}

    def _thinks_apart(self, setting: Setting) -> bool:
        return self._fitter.template.thinks_in_fields and _THINKING in self._answer(setting, "thinking")

    def _answer(self, setting: Setting, thinking: str = "") -> str:
        """A turn with words for its texts; empty where the template takes none after a user's message alone."""
        message = {"role": "assistant", "content": "answer"}
        if thinking:
            message["reasoning_content"] = thinking
        try:
            return self._rendered(message, "", setting)
        except RowProblem:
            return ""

    def _check_start(self, response: str, field: str, setting: Setting) -> None:
        answer = _CLOSED_BLOCK.sub("", _EMPTY_BLOCK.sub(r"\1", self._answer(setting)))
        head = answer.partition(_CONTENT)[0]
        lacking = [token for token in self._tokens if token in head and token not in response]
        if lacking:
            raise RowProblem(
                f"{field} has no {min(lacking, key=head.find)!r}, and this chat template writes {head!r} before an "
                f"answer; give the response as it was sampled, header and all, or {_IN_FIELD}"
            )
        if response.lstrip().startswith("<think>") and self._thinks_apart(setting):
            raise RowProblem(f"{field} thinks in <think>, and this chat template in another way; {_IN_FIELD}")
        if head.isspace() and response == response.lstrip():
            self._notes[f"responses without the {head!r} with which the chat template begins a turn"] += 1

    def _check_text_beside_calls(self, message: Message, where: str, setting: Setting, written: str) -> None:
        calls = message["tool_calls"]
        before = written[: written.find(calls[0]["function"]["name"])]
        tags = [tag for tag in _TAG.findall(before) if tag not in THINK_TAGS]
        if tag := next((tag for tag in tags if tag in message["content"]), ""):
            raise RowProblem(
                f"{where}.content has {tag!r}, with which the chat template writes calls, and tool_calls has them too: "
                "they would be trained twice; keep one of the two"
            )
        ids = [{"tool_call_id": call["id"]} if "id" in call else {} for call in calls]
        names = [{"name": call["function"]["name"]} for call in calls]
        results = [
            {"role": "tool", "content": _RESULT, **id, **name} for id, name in zip(ids, names, strict=True)
        ]
        try:
            text = self._fitter.render([_USER, {**message, "content": _CONTENT}, *results], setting)
        except RowProblem:  # a template that takes results in another way
            return
        if text.find(_RESULT) < text.find(_CONTENT):
            raise RowProblem(
                f"{where}.content stands behind the result of the call in the contexts of later turns, as the chat "
                "template writes it, and cannot have been sampled before it; take it out of the message, or give "
                "prompt+response"
            )

    def writes_name(self, role: str) -> bool:
        """Whether the template writes the ``name`` of a message."""
        if role not in self._writes_name:
            messages: list[Message] = [{"role": role, "content": _CONTENT, "name": _NAME}]
            messages.insert(0 if role == "assistant" else 1, _USER)
            try:
                self._writes_name[role] = _NAME in self._fitter.render(messages, Setting())
            except RowProblem:
                self._writes_name[role] = False
        return self._writes_name[role]

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
            self._notes[_CLOSES] += 1
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
        if calls and at < 0 and not end.found:
            self._notes[
                f"turns with calls that end with {end.text!r}, which the chat template does not write there"
            ] += 1
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


def check_thinking(context: str, written: str, where: str, notes: Counter[str], *, truncated: bool) -> None:
    """RowProblem on a turn whose thinking does not fit what the generation prompt has opened or closed."""
    prompt, start = context.rstrip(), written.lstrip()
    before, closed, _ = written.partition("</think>")
    opened = prompt.endswith("<think>")
    if opened and not closed and not truncated:
        raise RowProblem(
            f"{where} answers inside the think block that the generation prompt opens, and never closes it; give its "
            "thinking, begin it with </think> if there was none, mark the row truncated if it was cut off, or use a "
            "chat template that opens none (data.chat_template)"
        )
    if start.startswith("<think>") and prompt.endswith("</think>"):
        raise RowProblem(
            f"{where} thinks, and the generation prompt has closed its thinking already; give this row other "
            "chat_template_kwargs (enable_thinking), or take the thinking out"
        )
    if start.startswith("<think>") and not closed and not truncated:
        raise RowProblem(
            f"{where} opens thinking with <think> and never closes it, as a response that was cut off does; mark the "
            'row "truncated": true, or close the thinking with </think>'
        )
    if closed and not opened and "<think>" not in before:
        if not before.strip(" \t") or before.rstrip(" \t").endswith("\n"):
            raise RowProblem(
                f"{where} closes thinking with </think> that neither it nor the generation prompt opens; begin it "
                "with <think>, or use the chat template that it was sampled with (data.chat_template)"
            )
        notes["turns with a </think> that nothing opens"] += 1


def not_doubled(context: str, written: str) -> str:
    """``written`` without the tag at its start which the generation prompt has opened already."""
    start = written.lstrip()
    tail = context.rstrip()[-40:]
    for at in (match.start() for match in re.finditer("<", tail)):
        opened = tail[at:]
        if start.startswith(opened):
            rest = start.removeprefix(opened)
            space = context[len(context.rstrip()) :]
            return rest[_overlap(space, rest) :]
    return written


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


def _overlap(end: str, start: str) -> int:
    """How many characters at the end of the one are those at the start of the other."""
    return next((n for n in range(min(len(end), len(start)), 0, -1) if start.startswith(end[-n:])), 0)


def _put(text: str, word: str, value: str) -> str:
    """The value in the word's place; white space that template and value both have there is not doubled."""
    before, found, after = text.partition(word)
    if not found:
        return text
    value = value[_overlap(before[len(before.rstrip()) :], value) :]
    return before + value[: len(value) - _overlap(value[len(value.rstrip()) :], after)] + after


def _with_its_space(text: str, word: str) -> str:
    """The word instead of the text, with the white space at the text's ends: what a template does to that is seen."""
    bare = text.strip()
    return text.replace(bare, word) if bare else text
