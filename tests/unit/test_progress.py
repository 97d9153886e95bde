"""Progress where nothing is a terminal."""

import pytest

from trd_megatron import progress
from trd_megatron.progress import bar


def test_a_line_a_minute_takes_the_place_of_the_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "console", progress.Console(width=progress.WIDE, stderr=True))
    with bar("rollout", 100, "samples") as shown:
        shown.advance(10)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
        shown.tokens(7)
        shown.note("waiting")
        first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("rollout: 10/100  ") and "samples/s" in first and "tok/s" in first
    assert second.endswith("waiting")
