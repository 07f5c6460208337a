"""Which execution mode a stage computes in, and whether a CUDA graph can hold its decode steps.

* `plain`: transformers' own modules;
* `packed`: for a CPU, `fused_cpu` and `prepacked_linear` make it;
* `fast`: for a GPU, `fused_gpu` makes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models.fused_gpu import unsupported_reason
from mpipipe.models.operations import choose_operations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.kv_cache.base import KVCache
    from mpipipe.models.attention.base import AttentionBackend

__all__ = ["choose_mode", "graphs_unsupported_reason"]

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def choose_mode(
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
    assert asked in {"auto", "plain", "packed", "fast"}, f"no execution mode is called {asked}"
    if asked in {"plain", "packed"}:
        return asked, "asked for"
    if asked == "auto" and device.type != "cuda":
        return "packed", "weights laid out for the CPU"
    problem = "its KV cache has no pages"
    if isinstance(cache, PagedKVCache):
        problem = unsupported_reason(model, layers, cache.keys[0].shape[-1])
    assert asked == "auto" or not problem, f"no fused form: {problem}"
    if problem:
        return "plain", f"transformers' own modules: {problem}"
    operations, reason = choose_operations(device)
    return "fast", f"fused layers with {operations.name} operations: {reason}"


def graphs_unsupported_reason(config: Any, backend: AttentionBackend) -> str:
    """Why no CUDA graph can hold a stage's decode steps, as a phrase; empty: one can.

    Args:
        config: of the model, transformers'.
        backend: computes attention.
    """
    if backend.needs_seq_lens:
        return f'attention "{backend.name}" plans every step on the host'
    if any(getattr(config, name, None) for name in _EXPERT_COUNTS):
        return "the routing of experts makes shapes that depend on values"
    return ""
