"""One rank's layers from disk to ready: modules on meta, weights, buffers, cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mpipipe.checkpoint.index import read_index
from mpipipe.checkpoint.spec import read_spec
from mpipipe.kv_cache.contiguous import ContiguousKVCache
from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models.adapter import build_stage_model
from mpipipe.models.attention.select import choose_backend
from mpipipe.weights.loader import load_stage

if TYPE_CHECKING:
    from mpipipe.kv_cache.base import KVCache
    from mpipipe.models.adapter import StageModel
    from mpipipe.planning.plan import PipelinePlan, StagePlan

__all__ = ["StageParts", "load_parts"]


@dataclass(frozen=True, slots=True)
class StageParts:
    """What a stage computes with."""

    model: StageModel
    cache: KVCache
    loaded_bytes: int  # read from weight files
    weight_bytes: int  # held as parameters


def load_parts(plan: PipelinePlan, stage: StagePlan, trust_remote_code: bool) -> StageParts:
    """Build, fill and bind this rank's layers. Nothing of another stage is read.

    Raises:
        CheckpointError: the weights do not fit the model, or cannot be read.
        UnsupportedModelError: the family cannot be split.
    """
    folder = Path(plan.model_path)
    dtype = getattr(torch, plan.dtype)
    device = torch.device(plan.device)
    backend, _ = choose_backend(plan.attention)
    model = build_stage_model(
        folder,
        stage,
        dtype=dtype,
        backend=backend,
        max_context_tokens=plan.max_context_tokens,
        trust_remote_code=trust_remote_code,
    )
    report = load_stage(
        model.module,
        model.wanted_names(),
        read_index(folder),
        all_names=model.all_names,
        tied=model.tied,
        to_canonical=model.names.canonical,
        dtype=dtype,
        device=device,
    )
    cache = _make_cache(plan, stage, dtype, device)
    model.finish(cache)
    return StageParts(model, cache, report.bytes_read, report.parameter_bytes)


def _make_cache(
    plan: PipelinePlan, stage: StagePlan, dtype: torch.dtype, device: torch.device
) -> KVCache:
    if plan.kv_cache == "contiguous":
        return ContiguousKVCache()
    spec = read_spec(Path(plan.model_path))
    return PagedKVCache.allocate(
        num_layers=stage.num_layers,
        num_pages=plan.num_kv_pages,
        page_size=plan.page_size_tokens,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
        device=device,
    )
