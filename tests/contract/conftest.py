"""Without a GPU, Triton's kernels run in its interpreter; that must be said before its import.

(transformers imports Triton on its own, so a test module would be too late.)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.contract.tiny_models import TinyModel

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """A tiny model by its name, each made once; tests write nothing into its folder."""
    from tests.contract.tiny_models import save_tiny

    torch.set_num_threads(1)

    @cache
    def make(name: str) -> TinyModel:
        return save_tiny(name, tmp_path_factory.mktemp(name))

    return make
