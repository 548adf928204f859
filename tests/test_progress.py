"""What is said while a command runs: without a terminal, something every half minute."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pear_megatron import progress, watch
from pear_megatron.commands.errors import say_errors


def test_without_a_terminal_a_log_line_says_speed_and_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([0.0, 10.0, 40.0, 40.0, 50.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    with caplog.at_level("INFO"), progress.token_progress(10_000, replicas=2, show=True) as advance:
        for _ in range(3):
            advance(1_000)
    assert [record.getMessage() for record in caplog.records] == [
        "scored 4,000 of 20,000 tokens, 100 tokens/s, 3 min left"
    ]


def until(wanted: Callable[[], bool]) -> None:
    """Waits for it, ten seconds at most."""
    for _ in range(1000):
        if wanted():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


def test_a_command_that_is_long_at_work_says_so(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SECONDS", 0.02)
    told: list[str] = []

    def says(text: str) -> Callable[[], bool]:
        def look() -> bool:
            told.append(capfd.readouterr().err)
            return text in "".join(told)

        return look

    def slow() -> None:
        until(says("pear-megatron eval-compare; still at work after 0 s\n"))
        with progress.working("loading"):
            until(says("loading; still at work after 0 s\n"))
            watch.now("loading: 50%")
            until(says("loading: 50%; still at work after"))
        del told[:]
        until(says("pear-megatron eval-compare; still"))

    slow.__module__ = "pear_megatron.commands.eval_compare"
    say_errors(slow)()
    capfd.readouterr()
    time.sleep(0.1)
    assert capfd.readouterr().err == ""


def test_what_speaks_is_not_spoken_for(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SECONDS", 0.5)
    with watch.working("training"):
        for step in range(30):
            watch.said(f"step {step}")
            time.sleep(0.01)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(watch, "SECONDS", 0.01)
    with watch.working("another rank"):
        time.sleep(0.05)
    assert capfd.readouterr().err == ""


def test_what_was_done_before_does_not_shorten_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.Progress("compare", 5) as bar:
        for name in "abc":
            bar.advance(name, found=True)
        now = 600.0
        bar.advance("d")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "compare 1/5  a"
    assert lines[3] == "compare 4/5  d  (about 10 min left)"
