"""The token that ends an answer, as the tokenizer's chat template has it."""

from __future__ import annotations

from typing import Any

from pear_megatron.data.chat.ends import find_end, special_texts
from pear_megatron.data.chat.fit import Fitter
from pear_megatron.data.chat.template import Template


def end_of_turn(tokenizer: Any) -> int | None:
    """Id of the special token that ends an answer; None without a chat template.

    Base models' tokenizers have ``<|endoftext|>`` as EOS while their chat template ends a turn with ``<|im_end|>``:
    whoever stops at the EOS alone lets a model that was trained on chats write on.

    Raises:
        RowProblem: the chat template cannot be read, or it ends no turn and the tokenizer has no EOS.
    """
    if not tokenizer.chat_template:
        return None
    fitter = Fitter(Template(tokenizer, str(tokenizer.get_chat_template())))
    stop = find_end(fitter, special_texts(tokenizer), tokenizer.eos_token, calls=False).stop
    return int(tokenizer.convert_tokens_to_ids(stop))
