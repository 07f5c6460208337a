"""The KV cache of some layers in host memory, so that more rows run than a device holds. Pure.

Kernels read it there over the link, only the pages of a step's sequences. `offload_search` predicts
whether that completes the run sooner; here is when it is tried, and what the plan says of it.

Layers, not slots: the pages of a whole slot come once for all its layers, so there must be room for
two slots' pages of all layers, and a stage that streams its weights does so again for every slot.
Pages of one layer at a time need no room at all, and all rows share one pass over the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mpipipe.config.schema import AUTO, MemoryConfig
from mpipipe.planning.memory import RankMemory
from mpipipe.planning.offload_search import Candidate, RankRoom
from mpipipe.planning.placement import StageChoice, spread
from mpipipe.planning.plan import Decisions, KvInHost, StagePlan
from mpipipe.types import AttentionName, DeviceName

__all__ = ["kv_host_shares", "kv_in_host", "note_cache", "with_page_limits"]

_SHARES = (0.0, 0.5, 1.0)  # at least one layer of a stage stays


def kv_host_shares(
    memory: MemoryConfig, device: DeviceName, attention: AttentionName
) -> tuple[float, ...]:
    """Shares of the layers to try: only none where pages are counted or kernels are not ours."""
    is_counted = memory.num_kv_pages != AUTO or memory.kv_cache_bytes != AUTO
    is_ours = device == "cuda" and attention == "triton" and memory.kv_cache == "paged"
    if is_counted or not is_ours or memory.kv_host_bytes == 0:
        return (0.0,)
    return _SHARES


def kv_in_host(choice: StageChoice, first_layer: int) -> KvInHost | None:
    """Which layers of a stage that begins at `first_layer`; None: none."""
    if not choice.num_kv_host_layers:
        return None
    layers = spread(choice.num_kv_host_layers, range(choice.placed.shape.num_layers))
    numbers = tuple(first_layer + layer for layer in layers)
    return KvInHost(numbers, choice.forecast.kv_bytes, choice.forecast.kv_s)


def with_page_limits(
    needs: Sequence[RankMemory],
    stages: Sequence[StagePlan],
    rooms: Sequence[RankRoom],
    page_bytes: Callable[[int], int],
) -> tuple[RankMemory, ...]:
    """`needs` with the pages that host memory holds. `page_bytes`: of so many layers."""
    limited = []
    for need, stage, room in zip(needs, stages, rooms, strict=True):
        page_limit = None
        if stage.kv_in_host is not None:
            taken = 0 if stage.offload is None else stage.offload.host_bytes
            left = min(room.kv_host_bytes, room.pool_bytes - taken)
            # One more is no sequence's.
            page_limit = left // page_bytes(len(stage.kv_in_host.layers)) - 1
        limited.append(replace(need, page_limit=page_limit))
    return tuple(limited)


def note_cache(decisions: Decisions, best: Candidate) -> None:
    """Say where the cache is, if both were tried, and what either way is predicted to reach."""
    num_layers = sum(best.split)
    num_in_host = sum(stage.num_kv_host_layers for stage in best.stages)
    if not num_in_host and best.other_per_s is None:
        return
    gain = "" if best.other_per_s is None else f"{best.tokens_per_s / best.other_per_s:.2f} times"
    if num_in_host:
        reason = f"their KV cache is in host memory, for steps of {best.rows} rows"
        reason += f": {gain} as fast as with all of it on the devices" if gain else ""
    else:
        reason = f"all of the KV cache is on the devices: {gain} as fast as with a part of it in"
        reason += " host memory"
    decisions.note("memory.kv_host_layers", f"{num_in_host} of {num_layers} layers", reason)
