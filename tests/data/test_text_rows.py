"""Rows of text through the whole loader: turns as trajectories, what goes along with them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_rows import CHATML_THAT_FORGETS, a_row, write_jsonl

from pear_megatron.data import DataConfig, DataError, Trajectory, TrajectoryDataset, prepare, tokenizer_hash
from pear_megatron.data.files import Row as FileRow
from pear_megatron.data.validate import Validator
from tests.byte_tokenizer import CHATML

Config = Callable[..., DataConfig]
Row = dict[str, Any]

THINKING = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>add</think>4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "<think>again</think>6"},
]
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if documents %}{{ documents | tojson }}{% endif %}"
    "{% if shout %}!{% endif %}" + CHATML
)


WITH_CALLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace(
    " + '<|im_end|>'",
    " }}{% for c in m['tool_calls'] or [] %}{{ c['function'] | tojson }}{% endfor %}{{ '<|im_end|>'",
)


@pytest.fixture
def tokenizer(tmp_path: Path, byte_tokenizer: Callable[..., Any]) -> Callable[[str], Any]:
    """Saves a byte tokenizer with a template; ``name_or_path`` is its folder."""

    def make(template: str = CHATML) -> Any:
        made = byte_tokenizer(template)
        folder = tmp_path / f"tokenizer-{abs(hash(template))}"
        made.save_pretrained(folder)
        made.name_or_path = str(folder)
        return made

    return make


def load(
    config: Config, file: Path, tokenizer: Any, *, behavior: bool = False, **options: Any
) -> TrajectoryDataset:
    settings = {"tokenizer": tokenizer.name_or_path, "seq_length": 512, **options}
    return TrajectoryDataset.open(prepare(config(file, **settings), require_behavior_logprobs=behavior))


def shown(tokenizer: Any, trajectory: Trajectory) -> str:
    """Its text from the last user's message on, decisions in [[ ]]."""
    ids, mask = trajectory.input_ids.tolist(), trajectory.loss_mask
    first, last = int(np.argmax(mask)), int(np.flatnonzero(mask)[-1])
    assert mask[first : last + 1].all()
    return f"{tokenizer.decode(ids[:first])}[[{tokenizer.decode(ids[first : last + 1])}]]"


def test_each_turn_of_a_thinking_conversation_is_a_trajectory_as_it_was_sampled(
    tmp_path: Path, config: Config, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    forgets = tokenizer(CHATML_THAT_FORGETS)
    rows = [{"id": "m", "messages": THINKING, "reward": -0.5}, {"messages": THINKING[:2]}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    dataset = load(config, file, forgets)
    assert [t.id for t in dataset] == ["m#0", "m#1", f"{file}:2"]
    assert [t.reward for t in dataset] == [-0.5, -0.5, 1.0]
    assert shown(forgets, dataset[0]).endswith(
        "2+2?<|im_end|>\n<|im_start|>assistant\n[[<think>add</think>4<|im_end|>]]"
    )
    assert shown(forgets, dataset[1]).endswith(
        "assistant\n4<|im_end|>\n<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n"
        "[[<think>again</think>6<|im_end|>]]"
    )
    counts = dataset.meta["counts"]
    assert (counts["split_rows"], counts["split_trajectories"], counts["trajectories"]) == (1, 2, 3)
    one, two = len(dataset[0].input_ids), len(dataset[1].input_ids)
    assert (counts["split_tokens"], counts["split_whole_tokens"]) == (one + two, two)
    said = f"1 row was split into 2 trajectories, one per assistant turn: {one + two} tokens instead of {two}"
    assert said in caplog.text
    caplog.clear()
    load(config, file, forgets)  # from the cache: said again
    assert said in caplog.text


def test_multi_turn_says_which_rows_are_split(tmp_path: Path, config: Config, tokenizer: Any) -> None:
    plain, forgets = tokenizer(CHATML), tokenizer(CHATML_THAT_FORGETS)
    file = write_jsonl(tmp_path / "a.jsonl", [{"id": "m", "messages": THINKING}])
    assert [t.id for t in load(config, file, plain)] == ["m"]
    assert [t.id for t in load(config, file, plain, multi_turn="split")] == ["m#0", "m#1"]
    with pytest.raises(DataError, match=r"a\.jsonl:1: messages\[3\]: .*data\.multi_turn=split"):
        load(config, file, forgets, multi_turn="whole")


def test_ids_of_turns_are_unique_as_well(tmp_path: Path, config: Config, tokenizer: Any) -> None:
    rows = [{"id": "m", "messages": THINKING}, {"id": "m#1", "prompt": "a", "response": "b"}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"a\.jsonl:2: id = 'm#1' is duplicated: .*a\.jsonl:1 has it too"):
        load(config, file, tokenizer(CHATML_THAT_FORGETS))


def test_one_list_of_log_probs_is_cut_where_one_row_holds_all_contexts(
    tmp_path: Path, config: Config, tokenizer: Any
) -> None:
    plain = tokenizer(CHATML)
    (whole,) = load(config, write_jsonl(tmp_path / "plain.jsonl", [{"messages": THINKING}]), plain)
    logprobs = np.where(whole.loss_mask, -0.01 * (1 + np.arange(len(whole.input_ids))), 0.0)
    row = {"id": "m", "messages": THINKING, "behavior_logprobs": logprobs.tolist()}
    file = write_jsonl(tmp_path / "a.jsonl", [row])
    turns = list(load(config, file, plain, behavior=True, multi_turn="split"))
    assert [t.id for t in turns] == ["m#0", "m#1"]
    assert sum(t.loss_mask.sum() for t in turns) == whole.loss_mask.sum()
    for turn in turns:
        n = len(turn.input_ids)
        np.testing.assert_array_equal(turn.input_ids, whole.input_ids[:n])
        expected = np.where(turn.loss_mask, logprobs[:n], 0).astype(np.float32)
        np.testing.assert_array_equal(turn.behavior_logprobs, expected)

    with pytest.raises(DataError) as caught:
        load(config, file, tokenizer(CHATML_THAT_FORGETS), behavior=True)
    assert "behavior_logprobs is one list, and the conversation becomes 2 trajectories" in str(caught.value)
    assert "pear-megatron score" in str(caught.value)


def test_every_field_of_a_text_row_reaches_the_template(
    tmp_path: Path, config: Config, tokenizer: Any
) -> None:
    made = tokenizer(WITH_TOOLS)
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
    documents = [{"title": "Paris", "text": "A city."}]
    rows: list[Row] = [
        {"messages": THINKING[:2], "tools": tools},
        {"messages": THINKING[:2], "tools": json.dumps(tools)},
        {"prompt": THINKING[:1], "response": "4", "documents": documents},
        {"prompt": "2+2?", "response": "4", "chat_template_kwargs": {"shout": True}},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"messages": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    ]
    dataset = load(config, write_jsonl(tmp_path / "a.jsonl", rows), made)
    texts = [shown(made, trajectory) for trajectory in dataset]
    assert "get_weather" in texts[0]
    assert texts[0] == texts[1]
    assert "A city." in texts[2]
    assert texts[3] == "!" + texts[4]
    assert texts[4] == texts[5] == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n[[4<|im_end|>]]"


def test_a_template_from_a_file_and_its_arguments_replace_the_tokenizers(
    tmp_path: Path, config: Config, tokenizer: Any
) -> None:
    plain = tokenizer(CHATML)
    template = tmp_path / "loud.jinja"
    template.write_text(WITH_TOOLS)
    rows = [
        {"prompt": "a", "response": "b"},
        {"prompt": "a", "response": "b", "chat_template_kwargs": {"shout": False}},
    ]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    options = {"chat_template": str(template), "chat_template_kwargs": {"shout": True}}
    loud, quiet = load(config, file, plain, **options)
    assert shown(plain, loud) == "!" + shown(plain, quiet)  # a row's own arguments go first

    for wrong in (tmp_path / "nowhere.jinja", tmp_path):
        with pytest.raises(DataError, match=r"data\.chat_template = .* cannot be read"):
            load(config, file, plain, chat_template=str(wrong))
    with pytest.raises(DataError, match=r"data\.chat_template is set and data\.tokenizer is not"):
        prepare(config(file, chat_template=str(template)))


def test_tokens_of_another_template_or_other_arguments_are_refused(
    tmp_path: Path, config: Config, tokenizer: Any
) -> None:
    plain = tokenizer(CHATML)
    template = tmp_path / "loud.jinja"
    template.write_text(WITH_TOOLS)
    kwargs = {"shout": True}
    hashes = {
        tokenizer_hash(plain),
        tokenizer_hash(plain, WITH_TOOLS),
        tokenizer_hash(plain, WITH_TOOLS, kwargs),
        tokenizer_hash(plain, None, kwargs),
    }
    assert len(hashes) == 4
    assert tokenizer_hash(plain) == tokenizer_hash(plain, None, {}) == tokenizer_hash(plain, CHATML)

    scored = a_row(tokenizer_hash=tokenizer_hash(plain, WITH_TOOLS, kwargs))
    file = write_jsonl(tmp_path / "scored.jsonl", [scored])
    same = {"chat_template": str(template), "chat_template_kwargs": kwargs}
    assert len(load(config, file, plain, behavior=True, **same)) == 1
    for other in ({}, {"chat_template": str(template)}, {**same, "chat_template_kwargs": {"shout": False}}):
        with pytest.raises(DataError) as caught:
            load(config, file, plain, behavior=True, **other)
        for name in ("data.tokenizer", "data.chat_template", "data.chat_template_kwargs"):
            assert name in str(caught.value)


def test_the_cache_is_made_again_for_another_template_or_another_multi_turn(
    tmp_path: Path, config: Config, tokenizer: Any
) -> None:
    plain = tokenizer(CHATML)
    template = tmp_path / "loud.jinja"
    template.write_text(WITH_TOOLS)
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": THINKING[:2]}])
    variants: list[Row] = [
        {},
        {"multi_turn": "split"},
        {"chat_template": str(template)},
        {"chat_template": str(template), "chat_template_kwargs": {"shout": True}},
    ]
    settings = {"tokenizer": plain.name_or_path, "seq_length": 512}
    folders = {
        prepare(config(file, **settings, **variant), require_behavior_logprobs=False) for variant in variants
    }
    assert len(folders) == len(variants)
    before = prepare(config(file, **settings, **variants[2]), require_behavior_logprobs=False)
    template.write_text("?" + WITH_TOOLS)
    assert prepare(config(file, **settings, **variants[2]), require_behavior_logprobs=False) != before


def test_a_cut_response_has_no_end_of_turn(tmp_path: Path, config: Config, tokenizer: Any) -> None:
    plain = tokenizer(CHATML)
    rows = [
        {"messages": THINKING[:2], "truncated": True},
        {"prompt": "2+2?", "response": "<think>add</think>4", "truncated": True},
    ]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    for trajectory in load(config, file, plain, truncated="keep"):
        assert shown(plain, trajectory).endswith("assistant\n[[<think>add</think>4]]")
        assert trajectory.loss_mask[-1]


def test_an_overlong_turn_is_dropped_alone(tmp_path: Path, config: Config, tokenizer: Any) -> None:
    forgets = tokenizer(CHATML_THAT_FORGETS)
    messages = [*THINKING[:2], {"role": "user", "content": "x" * 300}, THINKING[3]]
    file = write_jsonl(tmp_path / "a.jsonl", [{"id": "m", "messages": messages}])
    dataset = load(config, file, forgets, seq_length=200, overlong="drop")
    assert [t.id for t in dataset] == ["m#0"]
    assert dataset.meta["counts"]["dropped_overlong"] == 1
    with pytest.raises(DataError, match=r"messages, assistant turn 1, has \d+ tokens, over-long"):
        load(config, file, forgets, seq_length=200)


def test_an_empty_turn_is_no_decision_and_said_so(
    tmp_path: Path, config: Config, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain = tokenizer(CHATML)
    messages = [THINKING[0], {"role": "assistant", "content": ""}, *THINKING[2:]]
    (trajectory,) = load(config, write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}]), plain)
    assert shown(plain, trajectory).endswith("[[<think>again</think>6<|im_end|>]]")
    assert "no decisions: 1" in caplog.text


def test_ids_without_an_end_token_are_counted(
    tmp_path: Path, config: Config, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain = tokenizer(CHATML)
    whole = {"input_ids": [1, 2, plain.eos_token_id], "loss_mask": [0, 1, 1]}
    cut = {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}
    file = write_jsonl(tmp_path / "a.jsonl", [whole, cut, cut, {**cut, "truncated": True}])
    load(config, file, plain, truncated="keep")
    assert "rows of ids that do not end with an end token and are not marked truncated: 2" in caplog.text


BAD = {
    "tools beside ids": (a_row(tools=[]), ["tools beside input_ids changes nothing", "'metadata'"]),
    "arguments beside ids": (a_row(chat_template_kwargs={"a": 1}), ["chat_template_kwargs beside input_ids"]),
    "token_weights of text": (
        {"prompt": "a", "response": "b", "token_weights": [1.0]},
        ["token_weights belongs to tokens, and prompt is text", "pear-megatron score"],
    ),
    "arguments that are no object": (
        {"prompt": "a", "response": "b", "chat_template_kwargs": [1]},
        ["chat_template_kwargs = [1] is a list; it must be an object"],
    ),
    "arguments that are no JSON": (
        {"prompt": "a", "response": "b", "chat_template_kwargs": "{a}"},
        ["chat_template_kwargs = '{a}' is no JSON"],
    ),
    "tools that are no list": ({"prompt": "a", "response": "b", "tools": "get"}, ["tools = 'get'"]),
    "misspelt": (
        {"prompt": "a", "response": "b", "chat_template_kwarg": {"a": 1}},
        ["unknown field 'chat_template_kwarg': did you mean 'chat_template_kwargs'?"],
    ),
    "ShareGPT, a key that is not read": (
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello", "train": False},
            ]
        },
        ["conversations[1].train = False would not be read"],
    ),
    "ShareGPT, bad": ({"conversations": [{"from": "human"}]}, ["conversations[0]"]),
    "prompt as JSON text": (
        {"prompt": '[{"role": "user", "content": "Hi"}]', "response": "b"},
        ["prompt is a list of messages written as JSON text"],
    ),
    "response as messages": (
        {"prompt": [{"role": "user", "content": "Hi"}], "response": [{"role": "assistant", "content": "b"}]},
        ["response is a list; it must be a string: give prompt and response as one list of 'messages'"],
    ),
    "prompt that is a number": ({"prompt": 3, "response": "b"}, ["prompt = 3 is a int"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_text_field_is_named(kind: str, tmp_path: Path, config: Config, tokenizer: Any) -> None:
    row, expected = BAD[kind]
    file = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError) as caught:
        load(config, file, tokenizer(CHATML))
    for part in [f"{file}:1: ", *expected]:
        assert part in str(caught.value)


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_is_the_first_message(
    config: Config, tmp_path: Path, tokenizer: Callable[[str], Any], column: str
) -> None:
    made, system = tokenizer(CHATML), {"role": "system", "content": "Be brief."}
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    written = {"messages": [system, user, answer]}
    rows: list[Row] = [
        written,
        {"messages": [user, answer], column: "Be brief."},
        written | {column: "Be brief."},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], column: "Be brief."},
        {"prompt": "Hi", "response": "Hello", column: "Be brief."},
        {"prompt": [user], "response": "Hello", column: "Be brief."},
    ]  # fmt: skip
    for empty in ("", None):
        rows.append(written | {column: empty})
    dataset = load(config, write_jsonl(tmp_path / "a.jsonl", rows), made)
    assert {shown(made, trajectory) for trajectory in dataset} == {
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "[[Hello<|im_end|>]]"
    }
    assert len(dataset) == len(rows)


HI, BRIEF = {"prompt": "Hi", "response": "Hello"}, {"system": "Be brief."}
ASKED: Row = {"role": "user", "content": "Hi"}
NO_SYSTEM: dict[str, tuple[Row, str]] = {
    "another": (
        {"messages": [{"role": "system", "content": "Think."}, ASKED], **BRIEF},
        "system = 'Be brief.', and the messages have 'Think.' as a system message of their own; keep one",
    ),
    "two columns": (HI | BRIEF | {"system_prompt": "Think."}, "system and system_prompt are different texts; keep one"),
    "parts": (HI | {"system": [{"text": "a"}]}, "system = .* is a list; it must be a string"),
    "half a character": (HI | {"system": "\ud83d"}, "system = .* half a character"),
    "the place of a message": (
        {"messages": [ASKED, {"role": "assistant", "content": 3}], **BRIEF}, r"messages\[1\]\.content = 3"
    ),
    "tools and functions": (
        HI | {"tools": [{"name": "f"}], "functions": [{"name": "f"}]}, "tools and functions are both there"
    ),
    "several responses": (HI | {"response": ["a", "b"]}, "response is a list of texts; give each of them as a row"),
    "tools of another form": (HI | {"tools": ["f"]}, r"tools = \['f'\]; it must be a list of objects"),
    "functions of another form": (HI | {"functions": ["f"]}, r"functions = \['f'\]; it must be a list of {name,"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "said"), NO_SYSTEM.values(), ids=NO_SYSTEM)
def test_columns_that_cannot_be_read_are_refused_with_the_row_s_own_places(
    config: Config, tmp_path: Path, tokenizer: Callable[[str], Any], row: Row, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        load(config, write_jsonl(tmp_path / "a.jsonl", [row]), tokenizer(CHATML))


def test_a_system_message_that_the_template_leaves_out_is_refused_by_its_column(
    config: Config, tmp_path: Path, tokenizer: Callable[[str], Any]
) -> None:
    made = tokenizer(CHATML.replace("{% for", "{% set messages = messages[1:] %}{% for", 1))
    row = {"prompt": "Hi", "response": "Hello", "system": "Be brief."}
    with pytest.raises(DataError, match="system: the chat template leaves it out"):
        load(config, write_jsonl(tmp_path / "a.jsonl", [row]), made)


def test_functions_are_tools_without_their_envelopes(
    config: Config, tmp_path: Path, tokenizer: Callable[[str], Any]
) -> None:
    made, function = tokenizer(WITH_TOOLS), {"name": "get_weather", "parameters": {"type": "object"}}
    pair = {"prompt": "Hi", "response": "Hello"}
    rows = [
        pair | {"tools": [{"type": "function", "function": function}]},
        pair | {"functions": [function]},
        pair | {"functions": json.dumps([function])},
        pair | {"functions": [function], "tools": []},
        pair | {"tools": [json.dumps({"type": "function", "function": function})]},
    ]
    dataset = load(config, write_jsonl(tmp_path / "a.jsonl", rows), made)
    (text,) = {shown(made, trajectory) for trajectory in dataset}
    assert '"type": "function", "function": {"name": "get_weather"' in text


NOTED: dict[str, tuple[Row, str | None]] = {
    "an empty prompt": ({"prompt": "", "response": "Hello"}, "messages of the user without text"),
    "calls without tools": (
        {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}]},
        "messages with calls in rows without 'tools'",
    ),
    "thinking in other tags": (
        {"prompt": [ASKED, {"role": "assistant", "content": "<thinking>a</thinking>b"}, ASKED], "response": "Hello"},
        "answers that begin with <thinking>, which is text to the chat template",
    ),
    "tools without an envelope": (
        {"prompt": "Hi", "response": "Hello", "tools": [{"name": "f"}]}, "without the {type, function: {...}}"
    ),
    "no tools": ({"prompt": "Hi", "response": "Hello", "tools": ""}, None),
    "another template's frame": ({"prompt": "[INST] Hi [/INST]", "response": "Hello"}, "end as another template's do"),
    "another end": ({"prompt": "Hi", "response": "Hello<|im_start|>"}, "a special token before their end"),
    "its end": ({"prompt": "Hi", "response": "Hello<|im_end|>"}, None),
}  # fmt: skip


@pytest.mark.parametrize(("row", "said"), NOTED.values(), ids=NOTED)
def test_what_a_row_may_not_have_meant_is_said(
    row: Row, said: str | None, config: Config, tokenizer: Callable[[str], Any]
) -> None:
    made = tokenizer(WITH_CALLS)
    validator = Validator(
        config("-", tokenizer=made.name_or_path, seq_length=512),
        require_behavior_logprobs=False,
        tokenizer=made,
    )
    (trajectory,) = validator(FileRow("a:1", row, 0))
    assert trajectory.loss_mask.any()
    assert len(validator.notes) == (said is not None)
    assert all(said is not None and said in note for note in validator.notes)
