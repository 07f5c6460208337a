"""The steps of a stage on tensors without memory: what launches kernels, launches them.

For `models.kernels.ahead`, which lists the launches. The steps are those of boot (`StageEngine
.prepare`) and the two kinds of prompt steps that a run begins with. Only shapes, types and strides
matter, so two layers stand for all; they are of one kind in the families that are fused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mpipipe.checkpoint.spec import read_spec
from mpipipe.kv_cache.common_tables import CommonTables, table_fields
from mpipipe.kv_cache.layout import SequenceLens, build_layout, decode_layout, to_device
from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models.adapter import StageModel, build_stage_model
from mpipipe.models.attention.select import make_backend
from mpipipe.models.llama_modules import LlamaModel
from mpipipe.models.operations import triton_operations
from mpipipe.planning.step_limits import num_request_rows, row_buckets
from mpipipe.planning.tensor_parallel import lane_spec
from mpipipe.stage.prefill import full_prefill

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.planning.plan import PipelinePlan, StagePlan

__all__ = ["dry_run", "prepare"]

_META = torch.device("meta")
_LAYERS = 2
# Tokens of the steps for which products of 8-bit weights are cut alike (`quantized_tuning`).
_NARROW_STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512)


@dataclass(slots=True)
class _EmptyLane:
    """Lane 0, of others that are not there."""

    num_lanes: int
    lane: int = 0

    def add_up(self, partial: torch.Tensor) -> torch.Tensor:
        return partial

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return torch.cat([part] * self.num_lanes, dim=-1)

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def prepare() -> None:
    """Import what torch's meta device takes at its first use: 3 s, torch._dynamo and sympy."""
    torch.cat([torch.arange(1, device=_META)] * 2)


@torch.inference_mode()
def dry_run(plan: PipelinePlan, stage: StagePlan) -> bool:
    """Run the steps of `stage`; False: nothing is known of its kernels before it is loaded.

    So it is where transformers' modules compute, or another attention than ours.
    """
    model = _dry_model(plan, stage)
    if model is None:
        return False
    for rows in row_buckets(plan.max_decode_rows):
        _decode(plan, model, rows)
        if plan.read_prefixes_once and rows > 1:
            _decode(plan, model, rows, common=_common_tables(rows))
    narrow = () if plan.quantize == "none" else _NARROW_STEPS
    for tokens in {plan.max_tokens_per_step, *narrow}:
        seq_lens, pages = full_prefill(replace(plan, max_tokens_per_step=tokens))
        _prefill(plan, model, [(seq_len, pages) for seq_len in seq_lens])
    # Prompts of unequal lengths, the shorter ones within the least block of queries.
    for lengths in ((17, 3), (129, 65)):
        _prefill(plan, model, _chunks(plan, lengths))
    return True


def _dry_model(plan: PipelinePlan, stage: StagePlan) -> StageModel | None:
    """The first layers of `stage`, without weights."""
    if plan.attention != "triton":
        return None
    last_layer = min(stage.last_layer, stage.first_layer + _LAYERS)
    model = build_stage_model(
        Path(plan.model_path),
        replace(stage, last_layer=last_layer, offload=None, kv_in_host=None),
        dtype=getattr(torch, plan.dtype),
        backend=make_backend(plan.attention),
        max_sequence_tokens=plan.max_sequence_tokens,
        quantize=plan.quantize,
        lanes=_EmptyLane(plan.tensor_parallel),
    )
    if not isinstance(model.module, LlamaModel):
        return None
    model.finish_without_weights(_cache(plan, model), triton_operations())
    return model


def _cache(plan: PipelinePlan, model: StageModel) -> PagedKVCache:
    spec = lane_spec(read_spec(Path(plan.model_path)), plan.tensor_parallel)
    return PagedKVCache.allocate(
        num_layers=model.plan.num_layers,
        num_pages=plan.num_kv_pages + 1,
        page_size=plan.page_size_tokens,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=model.dtype,
        device=_META,
        head_major=True,
    )


def _common_tables(rows: int) -> CommonTables:
    shapes = (shape for shape, _ in table_fields(rows).values())
    return CommonTables(*(torch.empty(s, dtype=torch.int32, device=_META) for s in shapes))


def _decode(
    plan: PipelinePlan, model: StageModel, rows: int, common: CommonTables | None = None
) -> None:
    """As `CudaGraphRunner` does; what follows greedy choices is torch's."""
    max_pages = -(-plan.max_sequence_tokens // plan.page_size_tokens)
    num_tokens = num_request_rows(plan.num_slots, plan.max_sequences_per_slot) + 1
    kv_len_B, active_B = (torch.empty(rows, dtype=torch.int32, device=_META) for _ in range(2))
    pages_BP = torch.empty(rows, max_pages, dtype=torch.int32, device=_META)
    request_rows_B = torch.empty(rows, dtype=torch.int64, device=_META)
    last_token = torch.empty(num_tokens, dtype=torch.int64, device=_META)
    positions_B, slots_B, tokens_B = model.operations.advance_rows(
        *(kv_len_B, active_B, pages_BP, request_rows_B, last_token),
        page_size=plan.page_size_tokens,
    )
    layout = decode_layout(
        pages_BP,
        kv_len_B,
        page_size=plan.page_size_tokens,
        max_kv_len=plan.max_sequence_tokens,
        placed=(positions_B, slots_B),
        common=common,
    )
    inputs = tokens_B if model.plan.has_embedding else _hidden(model, rows)
    result = model.forward_decode(inputs, layout)
    if model.plan.has_head:
        model.operations.greedy_ids(result)


def _chunks(plan: PipelinePlan, lengths: Sequence[int]) -> list[tuple[SequenceLens, Sequence[int]]]:
    entries: list[tuple[SequenceLens, Sequence[int]]] = []
    row = 0
    for number, length in enumerate(lengths):
        held = min(length, plan.max_sequence_tokens)
        entries.append((SequenceLens(number, row, held, held), range(held)))
        row += held
    return entries


def _prefill(
    plan: PipelinePlan, model: StageModel, entries: list[tuple[SequenceLens, Sequence[int]]]
) -> None:
    layout = to_device(
        build_layout(entries, plan.page_size_tokens),
        lambda tensor: tensor.to(_META),
        max_kv_len=plan.max_sequence_tokens,
    )
    inputs = torch.empty(layout.num_tokens, dtype=torch.int64, device=_META)
    if not model.plan.has_embedding:
        inputs = _hidden(model, layout.num_tokens)
    rows_S = torch.arange(len(entries), device=_META) if model.plan.has_head else None
    result = model.forward(inputs, layout, rows_S)
    if model.plan.has_head:
        model.operations.greedy_ids(result)


def _hidden(model: StageModel, rows: int) -> torch.Tensor:
    return torch.empty(rows, model.hidden_size, dtype=model.dtype, device=_META)
