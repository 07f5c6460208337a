"""Which attention backends import and can run in this process.

The choice among them is elsewhere (`planning.attention_choice`).
"""

from __future__ import annotations

import os

import torch

from mpipipe.models.attention.varlen import has_paged_varlen
from mpipipe.topology.compilers import flashinfer_is_usable

__all__ = ["available_backends"]


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
