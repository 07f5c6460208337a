"""What differs between the layers of one model, as attention backends and kernels take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["AttentionOptions", "HeadNorms"]


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What one layer asks of attention."""

    scale: float  # the factor on q·k, usually 1 / sqrt(D)
    window: int | None = None  # a query sees the last `window` positions, its own included
    softcap: float | None = None  # scores become softcap · tanh(scores / softcap)


@dataclass(frozen=True, slots=True, eq=False)
class HeadNorms:
    """RMS norms over each head's D before the rotation (Qwen 3)."""

    query_D: torch.Tensor
    key_D: torch.Tensor
    eps: float
