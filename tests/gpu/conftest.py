"""What GPU tests of engines share: small models, and the default stream put back after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from tests.contract.tiny_models import TinyModel, save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """A tiny model by its name in `tiny_models`, saved once a file."""
    torch.set_num_threads(1)

    @cache
    def make(name: str) -> TinyModel:
        return save_tiny(name, tmp_path_factory.mktemp(name))

    return make


@pytest.fixture
def own_stream() -> Iterator[None]:
    """A stream makes its stream the thread's current one: put the default one back."""
    yield
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.default_stream())
