"""`transformers.generate` as the rival: what it cannot do is refused, not left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpipipe.bench.baseline import BaselinePlace, generate_with_transformers
from mpipipe.errors import ConfigError
from mpipipe.types import Request, SamplingParams


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
def test_penalties_that_transformers_does_not_have_are_refused(name: str, tmp_path: Path) -> None:
    settings = SamplingParams().replace(**{name: 0.5})
    with pytest.raises(ConfigError, match="frequency or presence penalty"):
        generate_with_transformers(
            tmp_path / "no-model",
            [Request("a", 0, (1, 2), settings)],
            dtype="float32",
            batch_size=1,
            decode=str,
            place=BaselinePlace(),
        )
