"""What fuzzing draws: odd values, damage to good ones, damage to bytes; and what a reader may not do with them.

The suite draws the same small number of examples each time; PEAR_FUZZ=N draws N new ones per test.
"""

from __future__ import annotations

import copy
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

MANY = int(os.environ.get("PEAR_FUZZ", "0"))

# Where programs go wrong: ends of number types, texts that are no UTF-8, empty things, what a template or YAML reads.
EDGES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 127, 255, 2**31 - 1, 2**31, -(2**31) - 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64,
    10**40, 0.0, -0.0, 0.5, 1e-320, 1e39, 1e308, float("inf"), float("-inf"), float("nan"), "", " ", "0", "1", "-1",
    "nan", "null", "true", "\x00", "\n", "\ud800", "\udfff\ud800", "é", "e\u0301", "日本", "🙂", "\u2028", "\u202e",
    "<|im_end|>", "<think>", "</think>", "{{ 7 * 7 }}", "{% for x in y %}", "${oc.env:HOME}", "${data.train}", "${",
    "???", "../../x", "/", "~", "a" * 300, [], {}, [[]], [{}], [None], {"": None}, {"role": "assistant"}, [0] * 9,
]  # fmt: skip

_LUMPS = [b"[" * 3000, b'{"":' * 3000, b"\n", b"9" * 5000, b"&a [*a, *a]", b"!!python/name:os.system "]

scalars = st.one_of(
    st.sampled_from(EDGES).map(copy.deepcopy),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.text(st.characters(categories=["Cs", "Cc", "So", "Mn", "L"]), max_size=8),
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


class Hang(BaseException):
    """A reader has not come back; no reader catches it."""


@contextmanager
def in_time(seconds: float = 20) -> Iterator[None]:
    """Raises Hang if the body takes more processor time."""

    def hang(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def folder_alone() -> Iterator[Path]:
    """A new folder; what is written beside it, or left half-written in it, is an error. No hanging in the body."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where syncing costs nothing
    with tempfile.TemporaryDirectory(prefix="pear-fuzz-", dir=memory) as root:
        inside = Path(root) / "inside"
        inside.mkdir()
        with in_time():
            yield inside
        assert [path.name for path in Path(root).iterdir()] == ["inside"]
        assert [path for path in inside.rglob("*") if "partial" in path.name] == []


def examples(number: int) -> Callable[[Any], Any]:
    """Settings of a fuzzing test: so many examples, or PEAR_FUZZ."""
    return settings(
        max_examples=MANY or number,
        derandomize=not MANY,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink] if MANY else [Phase.generate],
    )


@st.composite
def damaged(draw: Any, good: Any, *, times: int = 3, values: Any = json_values) -> Any:
    """A copy of ``good`` (dicts, lists and plain values) with up to ``times`` places changed."""
    found = copy.deepcopy(good)
    for _ in range(draw(st.integers(0, times))):
        found = _changed(draw, found, values)
    return found


def _changed(draw: Any, value: Any, values: Any) -> Any:
    if not isinstance(value, dict | list) or not value:
        return draw(values)
    key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    what = draw(st.sampled_from(["within", "within", "within", "replace", "remove", "double", "another"]))
    if what == "within":
        value[key] = _changed(draw, value[key], values)
    elif what == "replace":
        value[key] = draw(values)
    elif what == "remove":
        del value[key]
    elif isinstance(value, list):
        value.insert(key, copy.deepcopy(value[key]) if what == "double" else draw(values))
    else:
        name = draw(st.text(max_size=8)) if what == "another" else f"{key}{draw(st.sampled_from('s_ X'))}"
        value[name] = copy.deepcopy(value[key]) if what == "double" else draw(values)
    return value


@st.composite
def damaged_bytes(draw: Any, good: bytes) -> bytes:
    """A copy of ``good``, cut, with bytes flipped, put in or taken out, or as it is."""
    data = bytearray(good)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        what = draw(st.sampled_from(["flip", "cut", "put in", "take out", "double"]))
        if what == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del data[at:]
        elif what == "put in":
            data[at:at] = draw(st.binary(max_size=9) | st.sampled_from(_LUMPS))
        elif what == "take out":
            del data[at : at + draw(st.integers(1, 40))]
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 40))]
    return bytes(data)
