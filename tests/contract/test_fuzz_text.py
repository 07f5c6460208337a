"""A short run of the fuzz targets of templates and tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.engine import Target, fuzz
from tests.fuzz.text_targets import TEXT_TARGETS

NUM_INPUTS = {"template": 300, "template-messages": 750, "tokenizer-text": 750}
FEW = 60  # a tokenizer is opened for each


@pytest.mark.parametrize("target", TEXT_TARGETS, ids=lambda target: target.name)
def test_nothing_but_error_records_and_the_documented_errors(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    figures = fuzz(target, tmp_path, NUM_INPUTS.get(target.name, FEW), seed=0)
    assert not figures.findings, "\n".join(
        f"{finding.kind}\n{finding.reproducer}\n{finding.text}" for finding in figures.findings
    )
