"""What FlashInfer's wrappers are given, without FlashInfer and without a GPU."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mpipipe.kv_cache.layout import SequenceLens, build_layout
from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models.attention.flashinfer_paged import FlashInferAttention
from mpipipe.models.layer_options import AttentionOptions

PAGE_SIZE, NUM_LAYERS = 4, 2


def as_lists(arguments: tuple[Any, ...]) -> list[Any]:
    return [a.tolist() if isinstance(a, torch.Tensor) else a for a in arguments]


def test_each_step_is_planned_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[tuple[list[Any], dict[str, Any]]] = []

    class Wrapper:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def plan(self, *arguments: Any, **settings: Any) -> None:
            plans.append((as_lists(arguments), settings))

        def run(self, query: torch.Tensor, _: object) -> torch.Tensor:
            return query

    flashinfer: Any = ModuleType("flashinfer")
    flashinfer.BatchDecodeWithPagedKVCacheWrapper = Wrapper
    flashinfer.BatchPrefillWithPagedKVCacheWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    layout = build_layout(
        [
            (SequenceLens(0, 0, 1, 9), [3, 4, 5]),
            (SequenceLens(1, 1, 1, 4), [7]),
            (SequenceLens(2, 2, 5, 7), [8, 9]),
            (SequenceLens(3, 7, 3, 3), [11]),
        ],
        PAGE_SIZE,
    )
    cache = PagedKVCache.allocate(
        num_layers=NUM_LAYERS, num_pages=12, page_size=PAGE_SIZE, num_kv_heads=2, head_dim=8,
        dtype=torch.float32,
    )  # fmt: skip
    backend = FlashInferAttention()
    for layer in range(NUM_LAYERS):
        query_THD, key_TKD = torch.randn(10, 4, 8), torch.randn(10, 2, 8)
        attended_THD = backend.attend(
            layer=layer, query_THD=query_THD, key_TKD=key_TKD, value_TKD=key_TKD, cache=cache,
            layout=layout, options=AttentionOptions(0.3, window=6),
        )  # fmt: skip
        assert torch.equal(attended_THD, query_THD)
    sizes = [4, 2, 8, PAGE_SIZE]  # query heads, KV heads, head dimension
    decode, prefill = plans
    assert decode[0] == [[0, 3, 4], [3, 4, 5, 7], [1, 4], *sizes]
    assert prefill[0] == [[0, 5, 8], [0, 2, 3], [8, 9, 11], [3, 3], *sizes]
    assert prefill[1]["causal"]
    assert decode[1]["window_left"] == prefill[1]["window_left"] == 5
