"""Attention with FlashInfer (the extra `cuda`), over pages.

Head dimensions 64, 128 and 256, float16 and bfloat16, compute capability 8.0 and later. FlashInfer
plans each step on the host from the lengths of all sequences, so the backend needs `seq_lens`, and
no CUDA graph can hold its steps. Its kernels are compiled at first use (tens of seconds), then kept
by FlashInfer on disk.

A plan's arrays go to the GPU from pinned memory without waiting. The next plan must not overwrite
them before the copy has ended: a small ring of wrappers, with an event each, prevents that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models.attention.base import AttentionBackend, AttentionInputs

if TYPE_CHECKING:
    from mpipipe.kv_cache.layout import BatchLayout
    from mpipipe.models.layer_options import AttentionOptions

    # "flashinfer", the kind of step, the order in memory, what the layer asks
    _PlanKey = tuple[str, str, str, AttentionOptions]

__all__ = ["FlashInferAttention"]

_WORKSPACE_BYTES = 128 << 20  # FlashInfer's own recommendation
_RING = 4  # steps planned ahead of the GPU without waiting for it
# "auto" takes FlashAttention-3 on Hopper, whose templates compile for minutes (170 s were not
# enough for a test); on other GPUs it is FlashAttention-2 anyway.
_KERNELS = "fa2"


@dataclass(slots=True, eq=False)
class _Planner:
    """One FlashInfer wrapper and the event behind its last plan's copies."""

    wrapper: Any
    copied: torch.cuda.Event


class FlashInferAttention(AttentionBackend):
    """Decodes and chunks of prompts each in one call."""

    name = "flashinfer"
    needs_seq_lens = True
    head_major = True

    def __init__(self) -> None:
        self._workspace: torch.Tensor | None = None
        self._rings: dict[_PlanKey, list[_Planner]] = {}

    def attend_stored(self, inputs: AttentionInputs) -> torch.Tensor:
        """See `AttentionBackend`."""
        layer, query_THD, _, _, cache, layout, options = inputs
        assert isinstance(cache, PagedKVCache), "it reads pages"
        keys, values, order = cache.keys[layer], cache.values[layer], "NHD"
        if not keys.is_contiguous():
            keys, values, order = keys.transpose(1, 2), values.transpose(1, 2), "HND"
        num_decodes = layout.num_decodes
        outputs: list[torch.Tensor] = []
        for kind, first, last in (
            ("decode", 0, num_decodes),
            ("prefill", num_decodes, len(layout.seq_lens)),
        ):
            if first == last:
                continue
            plan = ("flashinfer", kind, order, options)
            shape = cache.keys[layer].shape
            wrapper = layout.derive(
                plan, partial(self._plan, plan, layout, slice(first, last), query_THD, shape)
            )
            rows = slice(num_decodes) if kind == "decode" else slice(num_decodes, None)
            outputs.append(wrapper.run(query_THD[rows].contiguous(), (keys, values)))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _plan(
        self,
        plan: _PlanKey,
        layout: BatchLayout,
        sequences: slice,
        like: torch.Tensor,
        shape: torch.Size,
    ) -> Any:
        """A wrapper that has planned these `sequences`; the next of the plan's ring."""
        _, kind, _, options = plan
        planner = self._next_planner(plan, like.device)
        settings: dict[str, Any] = {
            "window_left": -1 if options.window is None else options.window - 1,
            "logits_soft_cap": options.softcap or 0.0,
            "sm_scale": options.scale,
            "q_data_type": like.dtype,
            "kv_data_type": like.dtype,
        }
        _, page_size, num_kv_heads, head_dim = shape
        seq_lens = layout.seq_lens[sequences]
        num_pages = [-(-seq.kv_len // page_size) for seq in seq_lens]
        last_page_lens = [(seq.kv_len - 1) % page_size + 1 for seq in seq_lens]
        pages = (
            _starts(num_pages),
            _pages(layout, sequences.start, num_pages),
            torch.tensor(last_page_lens, dtype=torch.int32),
        )
        sizes = (like.shape[1], num_kv_heads, head_dim, page_size)
        if kind == "decode":
            planner.wrapper.plan(*pages, *sizes, **settings)
        else:
            query_starts = _starts([seq.query_len for seq in seq_lens])
            planner.wrapper.plan(query_starts, *pages, *sizes, causal=True, **settings)
        planner.copied.record()
        return planner.wrapper

    def _next_planner(self, plan: _PlanKey, device: torch.device) -> _Planner:
        import flashinfer

        if self._workspace is None:
            self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        ring = self._rings.setdefault(plan, [])
        if len(ring) == _RING:
            ring.append(ring.pop(0))
            ring[-1].copied.synchronize()
            return ring[-1]
        _, kind, order, _ = plan
        if kind == "decode":
            # The tensor-core kernels serve every ratio of query to KV heads; the others only some.
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace, order, use_tensor_cores=True, backend=_KERNELS
            )
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                self._workspace, order, backend=_KERNELS
            )
        ring.append(_Planner(wrapper, torch.cuda.Event()))
        return ring[-1]


def _pages(layout: BatchLayout, first: int, num_pages: list[int]) -> torch.Tensor:
    """int32 on the device: the pages of sequences from `first` on, one after the other."""
    table_BP = layout.page_table_BP
    width = table_BP.shape[1]
    places = np.concatenate(
        [np.arange(number) + (first + row) * width for row, number in enumerate(num_pages)]
    )
    places_N = torch.from_numpy(places).pin_memory().to(table_BP.device, non_blocking=True)
    return table_BP.reshape(-1).index_select(0, places_N).int()


def _starts(lengths: list[int]) -> torch.Tensor:
    """int32 [B + 1] on the host: where each of these lengths begins, and the end."""
    return torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))
