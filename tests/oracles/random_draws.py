"""The uniforms of `stage.random_draws` in Python integers, and the keys of many seeds."""

from __future__ import annotations

import torch

from mpipipe.stage.random_draws import seed_key, signed_key

__all__ = ["keys_tensor", "uniform_reference"]

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def uniform_reference(seed: int, position: int) -> float:
    """The uniform u in [0, 1) for the token at `position`: output position + 1 of SplitMix64."""
    z = (seed_key(seed) + (position + 1) * _GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def keys_tensor(seeds: list[int], device: torch.device) -> torch.Tensor:
    """The keys of `seeds` as int64 [S], for `uniforms`."""
    return torch.tensor([signed_key(seed) for seed in seeds], dtype=torch.int64, device=device)
