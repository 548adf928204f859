"""Text rows become the tokens a behaviour policy sampled, with its choices marked as decisions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_rows import CHATML_WITH_MARKS, a_row, write_jsonl, write_parquet

from pear_megatron.data import (
    DataConfig,
    DataError,
    TrajectoryDataset,
    load_tokenizer,
    prepare,
    tokenizer_hash,
)
from pear_megatron.data.chat import ChatEncoder, Conversation, Encoded
from pear_megatron.data.errors import RowProblem
from tests.byte_tokenizer import CHATML
from tests.smollm2 import gguf_file

Config = Callable[..., DataConfig]
Tokenizers = Callable[..., Any]

TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello\n"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


def decisions(tokenizer: Any, encoded: Encoded) -> str:
    pairs = zip(encoded.input_ids, encoded.loss_mask, strict=True)
    return tokenizer.decode([token for token, flag in pairs if flag])


def encode(tokenizer: Any, **fields: Any) -> Encoded:
    (encoded,) = ChatEncoder(tokenizer).encode(Conversation(**fields))
    return encoded


@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_MARKS])
def test_decisions_are_the_assistant_turns_and_their_ends(template: str, byte_tokenizer: Tokenizers) -> None:
    tokenizer = byte_tokenizer(template)
    encoded = encode(tokenizer, messages=TWO_TURNS)
    assert decisions(tokenizer, encoded) == "Hello\n<|im_end|>4<|im_end|>"
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)


def test_prompt_and_response_are_one_exchange(byte_tokenizer: Tokenizers) -> None:
    tokenizer = byte_tokenizer()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    raw, written = encode(tokenizer, prompt="a", response="b"), encode(tokenizer, messages=messages)
    assert raw == written
    assert decisions(tokenizer, raw) == "b<|im_end|>"


def test_without_a_template_prompt_and_response_are_joined_and_ended(byte_tokenizer: Tokenizers) -> None:
    tokenizer = byte_tokenizer(None)
    encoded = encode(tokenizer, prompt="2+2=", response="4")
    assert tokenizer.decode(encoded.input_ids) == "2+2=4<|im_end|>"
    assert decisions(tokenizer, encoded) == "4<|im_end|>"


def test_without_a_template_an_end_in_the_middle_is_refused(byte_tokenizer: Tokenizers) -> None:
    tokenizer = byte_tokenizer(None)
    for truncated in (False, True):
        with pytest.raises(RowProblem, match=r"response contains '<\|im_end\|>', the token that ends a turn"):
            encode(tokenizer, prompt="a", response="b<|im_end|>c", truncated=truncated)
    assert decisions(tokenizer, encode(tokenizer, prompt="a", response="b<|im_end|>")) == "b<|im_end|>"


def test_without_a_template_a_prompt_has_one_bos(byte_tokenizer: Tokenizers) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(None)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    for prompt in ("2+2=", "<|im_start|>2+2="):
        encoded = encode(tokenizer, prompt=prompt, response="4")
        assert tokenizer.decode(encoded.input_ids) == "<|im_start|>2+2=4<|im_end|>"


BAD_MESSAGES = {
    "no list": ("hi", "messages = 'hi'; it must be a list"),
    "no role": ([{"content": "hi"}], r"messages\[0\] = .* must be an object with a role"),
    "no assistant": (TWO_TURNS[:2], "no assistant turn \\(roles: system, user\\)"),
    "no prompt": (TWO_TURNS[2:], r"messages\[0\] is an assistant turn without a prompt"),
    "empty response": ([TWO_TURNS[1], {"role": "assistant", "content": ""}], "is an empty response; drop"),
    "no content": ([{"role": "user"}, TWO_TURNS[4]], r"messages\[0\]\.content is missing"),
}


@pytest.mark.parametrize("kind", BAD_MESSAGES)
def test_bad_messages_are_named(kind: str, byte_tokenizer: Tokenizers) -> None:
    messages, expected = BAD_MESSAGES[kind]
    with pytest.raises(RowProblem, match=expected):
        encode(byte_tokenizer(), messages=messages)


def test_messages_without_a_template_are_refused(byte_tokenizer: Tokenizers) -> None:
    with pytest.raises(RowProblem, match=r"has no chat template; .* input_ids\+loss_mask"):
        encode(byte_tokenizer(None), messages=TWO_TURNS)


@pytest.fixture
def saved(tmp_path: Path, byte_tokenizer: Tokenizers) -> str:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_text_rows_are_tokenised_once_into_the_cache(tmp_path: Path, config: Config, saved: str) -> None:
    tokenizer = load_tokenizer(saved)
    encoded = encode(tokenizer, messages=TWO_TURNS)
    input_ids, mask = encoded.input_ids, encoded.loss_mask
    logprobs = [-0.5 if flag else None for flag in mask]
    rows = [
        {"messages": TWO_TURNS, "behavior_logprobs": logprobs, "id": "text"},
        {
            "input_ids": input_ids,
            "loss_mask": mask,
            "behavior_logprobs": logprobs,
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "id": "ids",
        },
    ]
    for file in (write_jsonl(tmp_path / "a.jsonl", rows), write_parquet(tmp_path / "a.parquet", rows)):
        made = config(file, tokenizer=saved, seq_length=200)
        dataset = TrajectoryDataset.open(prepare(made))
        assert dataset.meta["tokenizer_hash"] == tokenizer_hash(tokenizer)
        for trajectory in dataset:
            assert trajectory.input_ids.tolist() == input_ids
            assert trajectory.loss_mask.tolist() == mask


BAD_TEXT = {
    "empty response": ({"prompt": "a", "response": ""}, ["response = '' is empty", "drop the row"]),
    "response of a wrong type": ({"prompt": "a", "response": 4}, ["response = 4 is a int", "a string"]),
    "drifted log-probs": (
        {"prompt": "a", "response": "b", "behavior_logprobs": [-0.5]},
        ["behavior_logprobs has 1 entries and prompt, as data.tokenizer encodes it, "],
    ),
    "foreign tokenizer": (
        a_row(tokenizer_hash="0123456789abcdef"),
        ["tokenizer_hash = '0123456789abcdef', but data.tokenizer = ", "foreign tokenizer", "score the data"],
    ),
    "token of another tokenizer": (a_row(input_ids=[258] * 8), ["input_ids[0] = 258 is outside"]),
}


@pytest.mark.parametrize("kind", BAD_TEXT)
def test_bad_text_row_is_named(kind: str, tmp_path: Path, config: Config, saved: str) -> None:
    row, expected = BAD_TEXT[kind]
    file = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError) as caught:
        prepare(config(file, tokenizer=saved, seq_length=200, truncated="keep"))
    for part in [f"{file}:1: ", *expected]:
        assert part in str(caught.value)


def test_hash_survives_saving_and_padding_and_tells_templates_apart(
    saved: str, byte_tokenizer: Tokenizers
) -> None:
    tokenizer = byte_tokenizer()
    digest = tokenizer_hash(tokenizer)
    assert len(digest) == 16
    assert tokenizer_hash(load_tokenizer(saved)) == digest
    tokenizer("hello", truncation=True, max_length=3)
    assert tokenizer_hash(tokenizer) == digest
    assert tokenizer_hash(byte_tokenizer(CHATML_WITH_MARKS)) != digest
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_hash(tokenizer) != digest


def test_tokenizer_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"data\.tokenizer = 'nobody/nothing' was not found.*HF_HUB_OFFLINE"):
        load_tokenizer("nobody/nothing")
    with pytest.raises(DataError, match=r"the folder has no tokenizer\.json and 0 \.gguf files"):
        load_tokenizer(str(tmp_path))


def test_missing_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'pear-megatron\[hf\]'"):
        load_tokenizer("any")


@pytest.mark.slow
def test_smollm2_conversation_from_its_gguf_folder(tmp_path: Path, config: Config) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    tokenizer = load_tokenizer(str(gguf_file().parent))
    assert len(tokenizer) == 49152
    encoded = encode(tokenizer, messages=TWO_TURNS)
    assert decisions(tokenizer, encoded) == "Hello\n<|im_end|>4<|im_end|>"
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)

    tokenizer.save_pretrained(tmp_path / "saved")
    assert tokenizer_hash(load_tokenizer(str(tmp_path / "saved"))) == tokenizer_hash(tokenizer)

    rows = [
        {"messages": TWO_TURNS, "behavior_logprobs": [-0.5 if flag else None for flag in encoded.loss_mask]}
    ]
    made = config(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer=str(tmp_path / "saved"), seq_length=64)
    (trajectory,) = TrajectoryDataset.open(prepare(made, vocab_size=49152))
    assert trajectory.input_ids.tolist() == encoded.input_ids
    assert trajectory.loss_mask.tolist() == encoded.loss_mask


def test_a_word_that_the_tokenizer_does_not_know_is_named() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({"one": 0, "two": 1, "<end>": 2}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = ChatEncoder(transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>"))
    (encoded,) = encoder.encode(Conversation(prompt="one", response="two"))
    assert encoded.input_ids == [0, 1, 2]
    with pytest.raises(RowProblem, match=r"cannot encode 'three.*input_ids\+loss_mask"):
        encoder.encode(Conversation(prompt="one", response="three"))


def test_a_prompt_that_ends_with_the_assistant_is_refused(byte_tokenizer: Tokenizers) -> None:
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(RowProblem, match=r"prompt\[1\] is an assistant message"):
        ChatEncoder(byte_tokenizer()).encode(Conversation(prompt=prompt, response="c"))
