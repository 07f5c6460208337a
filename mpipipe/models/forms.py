"""Which form a stage computes in, and whether a CUDA graph can hold its decode steps.

The forms are made elsewhere: `packed` in `fused_layer` and `packed_linear`, `fast` in `fast_stack`;
`plain` are transformers' own modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models.fast_stack import obstacle
from mpipipe.models.operations import choose_operations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.kv_cache.base import KVCache
    from mpipipe.models.attention.base import AttentionBackend

__all__ = ["choose_form", "graph_obstacle"]

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def choose_form(
    asked: str, model: Any, layers: Sequence[Any], cache: KVCache, device: torch.device
) -> tuple[str, str]:
    """`plain`, `packed` or `fast`, and the reason for it.

    Args:
        asked: one of them, or `auto`: packed on a CPU, on a GPU fast where the family allows it.
        model: the causal language model that the stage was cut from.
        layers: the stage's.
        cache: the stage's.
        device: where the weights are.
    """
    assert asked in {"auto", "plain", "packed", "fast"}, f"no form is called {asked}"
    if asked in {"plain", "packed"}:
        return asked, "asked for"
    if asked == "auto" and device.type != "cuda":
        return "packed", "weights laid out for the CPU"
    problem = "its KV cache has no pages"
    if isinstance(cache, PagedKVCache):
        problem = obstacle(model, layers, cache.keys[0].shape[-1])
    assert asked == "auto" or not problem, f"no fused form: {problem}"
    if problem:
        return "plain", f"transformers' own modules: {problem}"
    operations, reason = choose_operations(device)
    return "fast", f"fused layers with {operations.name} operations: {reason}"


def graph_obstacle(config: Any, backend: AttentionBackend) -> str:
    """Why no CUDA graph can hold a stage's decode steps, as a phrase; empty: one can.

    Args:
        config: of the model, transformers'.
        backend: computes attention.
    """
    if backend.needs_spans:
        return f'attention "{backend.name}" plans every step on the host'
    if any(getattr(config, name, None) for name in _EXPERT_COUNTS):
        return "the routing of experts makes shapes that depend on values"
    return ""
