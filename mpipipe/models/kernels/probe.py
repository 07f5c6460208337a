"""Whether Triton can compile and run kernels in this process, found out once by running one.

A wheel that imports proves little: Triton builds its launcher with a C compiler at first use, which
many cluster nodes lack, and a driver may be too old for the code it emits.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING

from mpipipe.models.foreign import in_short
from mpipipe.topology.packages import has_c_compiler

if TYPE_CHECKING:
    import torch

__all__ = ["available", "launch_trial"]


@cache
def available() -> tuple[bool, str]:
    """Whether the kernels of this package work here, and a sentence saying why not. Never raises.

    The first call compiles one small kernel (about a second) and waits for its result.
    """
    reason = _missing_part() or _trial_failure()
    return (reason == "", reason)


def launch_trial(device: str) -> torch.Tensor:
    """What `available` runs: its result is 1 everywhere."""
    import torch

    from mpipipe.models.kernels.rowwise import rms_norm

    hidden_TH = torch.full((2, 96), 3.0, dtype=torch.float16, device=device)
    return rms_norm(hidden_TH, torch.ones_like(hidden_TH[0]), 0.0)


def _missing_part() -> str:
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability()
    if capability < (7, 5):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, 7.5 is needed"
    if not has_c_compiler(os.environ):
        return "Triton needs a C compiler for its launcher: $CC, where set, else gcc or clang"
    return ""


def _trial_failure() -> str:
    """Run one kernel; what Triton raises has no common class (its own, OSError, RuntimeError)."""
    try:
        wrong = bool((launch_trial("cuda") - 1.0).abs().max() > 1e-2)
    except Exception as error:  # noqa: BLE001 - Triton's compile errors derive from Exception alone
        return f"a trial kernel failed: {in_short(error)}"
    return "a trial kernel computed wrong numbers" if wrong else ""
