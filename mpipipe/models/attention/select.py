"""The attention backend of a plan, by its name.

Which one `auto` means is decided on the head, for all ranks (`planning.attention_choice`); names
are checked with the rest of the configuration (`config.checks`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpipipe.models.attention.flashinfer_paged import FlashInferAttention
from mpipipe.models.attention.reference import ReferenceAttention
from mpipipe.models.attention.sdpa import SdpaAttention
from mpipipe.models.attention.triton_paged import TritonAttention
from mpipipe.models.attention.varlen import VarlenAttention

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpipipe.models.attention.base import AttentionBackend

__all__ = ["make_backend"]

_BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "triton": TritonAttention,
    "flashinfer": FlashInferAttention,
    "varlen": VarlenAttention,
    "sdpa": SdpaAttention,
    "reference": ReferenceAttention,
}


def make_backend(name: str) -> AttentionBackend:
    """The backend that a plan calls `name`."""
    return _BACKENDS[name]()
