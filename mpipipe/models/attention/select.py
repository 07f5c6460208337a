"""The choice of an attention backend by its configured name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpipipe.errors import ConfigError
from mpipipe.models.attention.reference import ReferenceAttention
from mpipipe.models.attention.sdpa import SdpaAttention

if TYPE_CHECKING:
    from mpipipe.models.attention.base import AttentionBackend

__all__ = ["choose_backend"]


def choose_backend(name: str) -> tuple[AttentionBackend, str]:
    """The backend called `name` (`sdpa`, `reference` or `auto`), and the reason for the choice.

    Raises:
        ConfigError: there is no such backend.
    """
    if name == "auto":
        return SdpaAttention(), "torch's fused attention runs on every device"
    if name == "sdpa":
        return SdpaAttention(), "asked for"
    if name == "reference":
        return ReferenceAttention(), "asked for (slow: made for tests)"
    raise ConfigError(
        f'pipeline.attention = "{name}" is no attention backend: use "auto", "sdpa" or "reference"'
    )
