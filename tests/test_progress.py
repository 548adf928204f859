"""What is said while scoring runs."""

from __future__ import annotations

import pytest

from pear_megatron import progress


def test_without_a_terminal_a_log_line_says_speed_and_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([0.0, 10.0, 40.0, 50.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    with caplog.at_level("INFO"), progress.token_progress(10_000, replicas=2, show=True) as advance:
        for _ in range(3):
            advance(1_000)
    assert [record.getMessage() for record in caplog.records] == [
        "scored 4,000 of 20,000 tokens, 100 tokens/s, 0 h 3 min left"
    ]
