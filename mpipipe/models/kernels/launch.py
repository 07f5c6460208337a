"""What the kernels share: early launch, score capping, block shapes, facts about the device.

Early launch: a kernel may start before the one ahead of it in the stream has finished. On Hopper
and later (programmatic dependent launch) a kernel that is launched this way takes the places that
the kernel ahead of it leaves free, does what needs no input of its own, and waits for its inputs on
the device. CUDA graphs keep such edges since CUDA 12.3. Tried and left out: fetching weights into
the L2 meanwhile, which made a layer slower (H200).

Invariants, without which results would be stale: every program of every kernel here calls
`await_inputs` before it reads anything and before it writes at all. Weights are no exception: those
of a streamed layer stand in a buffer that a copy has just filled. So a
kernel that has ended implies that all before it have ended, and kernels launched in the ordinary
way fit in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

__all__ = [
    "LOG2_E",
    "MAX_COUNTERS",
    "GpuFacts",
    "await_inputs",
    "block_dim",
    "gpu_capability",
    "has_async_copy",
    "launch_options",
    "loaded_dim",
    "meta_stands_for",
    "num_processors",
    "soft_capped",
    "zeroed_counters",
]

MAX_COUNTERS = 1 << 16
# Measured, H200, whole decode layers: 0 to 7 % faster from 1 to 32 rows, the same from 128 on.
# tests/gpu turn it off, to measure the difference.
EARLY_LAUNCH = True


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What the form of kernels follows from."""

    capability: tuple[int, int]
    num_processors: int  # multiprocessors


_STAND_IN: list[GpuFacts] = []  # at most one


def meta_stands_for(gpu: GpuFacts) -> None:
    """From here on, kernels take the form for meta tensors that they have on `gpu` (`ahead`)."""
    _STAND_IN[:] = [gpu]


def gpu_capability(device: torch.device) -> tuple[int, int] | None:
    """Of the GPU that holds tensors of `device`; None: it is none."""
    if device.type == "meta":
        return _STAND_IN[0].capability if _STAND_IN else None
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def launch_options(device: torch.device) -> dict[str, bool]:
    """The options with which every kernel on `device` is launched: early, where that is allowed."""
    early = EARLY_LAUNCH and _supports_early_launch(device)
    return {"EARLY": early, "launch_pdl": early}


@cache
def _supports_early_launch(device: torch.device) -> bool:
    capability = gpu_capability(device)
    # Triton 3.4 brought it.
    return capability is not None and capability >= (9, 0) and hasattr(tl.extra.cuda, "gdc_wait")


@cache
def zeroed_counters(device: torch.device) -> torch.Tensor:
    """int32 counters, zero between kernels: a kernel that counts in them sets them back.

    All kernels on a device share them, so such kernels must not run on several streams at once.
    """
    assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), (
        "the kernel must run once before it is captured in a CUDA graph"
    )
    return torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)


@triton.jit
def await_inputs(EARLY: tl.constexpr):
    """Let the next kernel launch when it finds room, and wait for all kernels before this one."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


# ---- attention -----------------------------------------------------------------------------------

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), and exp2 is one instruction


def block_dim(head_dim: int) -> int:
    """The tile width for a head dimension: tiles are powers of two, and tl.dot wants 16."""
    assert head_dim <= 256, f"head_dim {head_dim} exceeds the 256 that the kernels hold"
    return max(int(triton.next_power_of_2(head_dim)), 16)


def loaded_dim(cache: torch.Tensor) -> int:
    """How much of each head's row the kernels read from a cache [pages, page_size, K, D].

    Rows that are padded in memory to a multiple of 8 elements are read padding included, because
    16-byte loads need multiples of 8; such padding must hold finite numbers.
    """
    head_dim = cache.shape[3]
    padded = -(-head_dim // 8) * 8
    row = min(stride for stride, size in zip(cache.stride()[:3], cache.shape, strict=False) if size)
    return padded if row >= padded else head_dim


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere (Triton's interpreter)."""
    if device.type == "meta" and _STAND_IN:
        return _STAND_IN[0].num_processors
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def has_async_copy(device: torch.device) -> bool:
    """Whether loads can be pipelined through shared memory (Ampere and later)."""
    capability = gpu_capability(device)
    return capability is not None and capability >= (8, 0)


@triton.jit
def soft_capped(score, cap):
    """Scores within ±cap: cap * tanh(score / cap), by way of exp: Triton itself has no tanh."""
    exponent = tl.minimum(2.0 * score / cap, 80.0)  # tanh(40) is 1 in float32; exp(89) overflows
    return cap * (1.0 - 2.0 / (tl.exp(exponent) + 1.0))
