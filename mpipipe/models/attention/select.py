"""Which attention backends can run in this process, and the backend that a plan names.

`planning.attention_choice` decides on the head, for all ranks, which one `auto` means;
`config.checks` checks the names.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from mpipipe.models.attention.flashinfer_paged import FlashInferAttention
from mpipipe.models.attention.reference import ReferenceAttention
from mpipipe.models.attention.sdpa import SdpaAttention
from mpipipe.models.attention.triton_paged import TritonAttention
from mpipipe.models.attention.varlen import VarlenAttention, has_paged_varlen
from mpipipe.topology.packages import flashinfer_is_usable

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpipipe.models.attention.base import AttentionBackend

__all__ = ["available_backends", "make_backend"]


def available_backends() -> tuple[str, ...]:
    """The names of what could run here, best first; the model may still rule one out.

    On a machine with a GPU the first call compiles one small kernel (about a second).
    """
    names: list[str] = []
    if torch.cuda.is_available():
        from mpipipe.models.kernels.probe import available

        has_ampere = torch.cuda.get_device_capability()[0] >= 8
        if available()[0]:
            names.append("triton")
        if has_ampere and has_paged_varlen():
            names.append("varlen")
        if has_ampere and flashinfer_is_usable(os.environ):
            names.append("flashinfer")
    return (*names, "sdpa", "reference")


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
