"""What GPU tests of engines share: small models, and the default stream put back after each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.contract.conftest import tiny

__all__ = ["own_stream", "tiny"]


@pytest.fixture
def own_stream() -> Iterator[None]:
    """A stream makes its stream the thread's current one: put the default one back."""
    yield
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.default_stream())
