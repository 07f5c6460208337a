"""The benchmark of the head, which is run by hand, goes on working."""

from __future__ import annotations

import gc
import sys

import pytest

from tests.benchmarks import head


def test_the_benchmark_completes_and_resumes_its_prompts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It asserts itself that all prompts are completed with all their tokens."""
    monkeypatch.setattr(sys, "argv", ["head", "--prompts", "40", "--tokens", "3"])
    try:
        head.main()
    finally:
        gc.unfreeze()  # it freezes, as a boot does
    told = capsys.readouterr().out
    assert "from the file to the merged file" in told
    assert "resumed, 10 left" in told
