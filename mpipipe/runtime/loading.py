"""One rank's layers from disk to ready: modules on meta, weights, buffers, cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mpipipe.checkpoint.index import read_index
from mpipipe.checkpoint.spec import read_spec
from mpipipe.errors import EnvironmentSetupError
from mpipipe.kv_cache.base import ContiguousKVCache
from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models.adapter import build_stage_model
from mpipipe.models.attention.select import make_backend
from mpipipe.planning.cost import kv_page_bytes
from mpipipe.weights.loader import load_stage
from mpipipe.weights.random import fill_random

if TYPE_CHECKING:
    from mpipipe.kv_cache.base import KVCache
    from mpipipe.metrics.boot import BootTimeline
    from mpipipe.models.adapter import StageModel
    from mpipipe.planning.plan import PipelinePlan, StagePlan
    from mpipipe.weights.loader import LoadReport

__all__ = ["StageParts", "load_parts", "stage_bytes"]


@dataclass(frozen=True, slots=True)
class StageParts:
    """What a stage computes with."""

    model: StageModel
    cache: KVCache
    loaded_bytes: int  # read from weight files
    weight_bytes: int  # held as parameters
    needs_seq_lens: bool  # of the attention backend: it plans each step on the host
    load_warnings: tuple[str, ...] = ()  # what made loading slower than it could be


def stage_bytes(plan: PipelinePlan, stage: StagePlan) -> dict[str, int]:
    """Bytes that this stage holds by what they are for, as planned."""
    spec = read_spec(Path(plan.model_path))
    page_bytes = kv_page_bytes(
        spec, plan.dtype, num_layers=stage.num_layers, page_size_tokens=plan.page_size_tokens
    )
    return {"weights": stage.weight_bytes, "KV cache": plan.num_kv_pages * page_bytes}


def load_parts(
    plan: PipelinePlan,
    stage: StagePlan,
    trust_remote_code: bool,
    device: torch.device,
    boot: BootTimeline,
) -> StageParts:
    """Build, fill and bind this rank's layers on `device`. Nothing of another stage is read.

    Its parts begin in `boot`.

    Raises:
        CheckpointError: the weights do not fit the model, or cannot be read.
        UnsupportedModelError: the family cannot be split.
        EnvironmentSetupError: the GPU's memory does not hold what was planned.
    """
    try:
        return _load_parts(plan, stage, trust_remote_code, device, boot)
    except torch.OutOfMemoryError as error:
        raise EnvironmentSetupError(
            f"the GPU of stage {stage.stage} ({stage.host}) has too little memory for its weights "
            f"and KV cache ({str(error).splitlines()[0]}): most likely another process took some "
            "meanwhile; lower memory.gpu_memory_fraction or memory.kv_cache_bytes"
        ) from error


def _load_parts(
    plan: PipelinePlan,
    stage: StagePlan,
    trust_remote_code: bool,
    device: torch.device,
    boot: BootTimeline,
) -> StageParts:
    folder = Path(plan.model_path)
    dtype = getattr(torch, plan.dtype)
    backend = make_backend(plan.attention)
    model = build_stage_model(
        folder,
        stage,
        dtype=dtype,
        backend=backend,
        max_sequence_tokens=plan.max_sequence_tokens,
        trust_remote_code=trust_remote_code,
        quantize=plan.quantize,
    )
    report = _load(model, plan, device, boot)
    boot.begin("cache")
    cache = _make_cache(plan, stage, dtype, device, head_major=backend.head_major)
    boot.begin("convert weights")  # into the layout to compute with, after trial steps
    model.finish(cache)
    return StageParts(
        model,
        cache,
        report.bytes_read,
        report.parameter_bytes,
        backend.needs_seq_lens,
        report.warnings,
    )


def _load(
    model: StageModel, plan: PipelinePlan, device: torch.device, boot: BootTimeline
) -> LoadReport:
    """The stage's weights from its files, or random ones, for which `config.json` is enough."""
    if plan.weights == "random":
        boot.begin("convert weights")
        return fill_random(
            model.module,
            model.wanted_names(),
            tied=model.tied,
            dtype=model.dtype,
            device=device,
        )
    boot.begin("read weights")
    report = load_stage(
        model.module,
        model.wanted_names(),
        read_index(Path(plan.model_path)),
        all_names=model.all_names,
        tied=model.tied,
        to_canonical=model.names.canonical,
        dtype=model.dtype,
        device=device,
    )
    boot.divide("convert weights", report.convert_s, report.bytes_read)
    return report


def _make_cache(
    plan: PipelinePlan,
    stage: StagePlan,
    dtype: torch.dtype,
    device: torch.device,
    *,
    head_major: bool,
) -> KVCache:
    if plan.kv_cache == "contiguous":
        return ContiguousKVCache()
    spec = read_spec(Path(plan.model_path))
    # On a GPU the last page is no sequence's: rows without a sequence write there.
    num_pages = plan.num_kv_pages + (device.type == "cuda")
    return PagedKVCache.allocate(
        num_layers=stage.num_layers,
        num_pages=num_pages,
        page_size=plan.page_size_tokens,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
        device=device,
        head_major=head_major,
    )
