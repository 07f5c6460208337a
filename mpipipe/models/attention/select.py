"""The attention backend of a plan, by its name.

Which one `auto` means is decided on the head, for all ranks (`planning.attention_choice`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpipipe.errors import ConfigError
from mpipipe.models.attention.flashinfer_paged import FlashInferAttention
from mpipipe.models.attention.reference import ReferenceAttention
from mpipipe.models.attention.sdpa import SdpaAttention
from mpipipe.models.attention.triton_paged import TritonAttention
from mpipipe.models.attention.varlen import VarlenAttention

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpipipe.models.attention.base import AttentionBackend

__all__ = ["choose_backend"]

_BACKENDS: dict[str, tuple[Callable[[], AttentionBackend], str]] = {
    "auto": (SdpaAttention, "torch's fused attention runs on every device"),
    "triton": (TritonAttention, "our own kernels over pages"),
    "flashinfer": (FlashInferAttention, "asked for"),
    "varlen": (VarlenAttention, "torch's flash attention over pages"),
    "sdpa": (SdpaAttention, "runs on every device"),
    "reference": (ReferenceAttention, "asked for (slow: made for tests)"),
}


def choose_backend(name: str) -> tuple[AttentionBackend, str]:
    """The backend called `name`, and what speaks for it. `auto` is `sdpa` here.

    Raises:
        ConfigError: there is no such backend.
    """
    if name not in _BACKENDS:
        known = ", ".join(f'"{known}"' for known in _BACKENDS)
        raise ConfigError(
            f'pipeline.attention = "{name}" is no attention backend: use one of {known}'
        )
    make, reason = _BACKENDS[name]
    return make(), reason
