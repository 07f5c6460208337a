"""What both attention kernels share: score capping, block shapes, and facts about the device."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

__all__ = ["LOG2_E", "block_dim", "has_async_copy", "loaded_dim", "num_processors", "soft_capped"]

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
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def has_async_copy(device: torch.device) -> bool:
    """Whether loads can be pipelined through shared memory (Ampere and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@triton.jit
def soft_capped(score, cap):
    """Scores within ±cap: cap * tanh(score / cap), by way of exp: Triton itself has no tanh."""
    exponent = tl.minimum(2.0 * score / cap, 80.0)  # tanh(40) is 1 in float32; exp(89) overflows
    return cap * (1.0 - 2.0 / (tl.exp(exponent) + 1.0))
