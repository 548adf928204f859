"""The data section's keys as options: what a command says where the loader speaks of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pear_megatron.data.errors import DataError

# The longer of two that begin alike comes first.
TEXT_OPTIONS = {
    "data.multi_turn=split (--multi-turn split)": "--multi-turn split",
    "data.multi_turn": "--multi-turn",
    "data.chat_template_kwargs": "--chat-template-kwargs",
    "data.chat_template": "--chat-template",
    "data.tokenizer": "--tokenizer",
}
# Of commands that take the files as arguments, and --seq-length.
FILE_OPTIONS = {**TEXT_OPTIONS, "check data.train": "check the path", "data.seq_length": "--seq-length"}


@contextmanager
def in_options(options: Mapping[str, str]) -> Iterator[None]:
    """Raises a DataError from within with ``options``, {key of a recipe: option}, put in the keys' places."""
    try:
        yield
    except DataError as error:
        said = []
        for problem in error.problems:
            for key, option in options.items():
                problem = problem.replace(key, option)
            said.append(problem)
        raise DataError(said, error.total, error.listed) from error
