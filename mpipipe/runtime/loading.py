"""One rank's layers from disk to ready: modules on meta, weights, buffers, cache."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mpipipe.checkpoint.index import read_index
from mpipipe.checkpoint.spec import read_spec
from mpipipe.data_plane.lanes import ALONE
from mpipipe.errors import EnvironmentSetupError
from mpipipe.models.adapter import build_stage_model
from mpipipe.models.attention.select import make_backend
from mpipipe.models.streaming import NO_GATES, StreamedWeights
from mpipipe.planning.cost import kv_page_bytes
from mpipipe.planning.tensor_parallel import lane_spec
from mpipipe.runtime.kv_memory import KvMemory, open_kv_memory
from mpipipe.topology.slurm import read_job
from mpipipe.weights.loader import load_stage
from mpipipe.weights.offload import StageTensors, open_offload
from mpipipe.weights.random import fill_random

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpipipe.data_plane.lanes import Lanes
    from mpipipe.metrics.boot import BootTimeline
    from mpipipe.metrics.offload import OffloadUse
    from mpipipe.models.adapter import StageModel
    from mpipipe.planning.plan import PipelinePlan, StagePlan
    from mpipipe.weights.destination import Destination
    from mpipipe.weights.loader import LoadReport
    from mpipipe.weights.offload import OffloadedWeights

__all__ = ["StageParts", "load_parts", "stage_bytes", "stage_tensors", "streamed_weights"]


@dataclass(frozen=True, slots=True)
class StageParts:
    """What a stage computes with."""

    model: StageModel
    kv_memory: KvMemory
    loaded_bytes: int  # read from weight files
    weight_bytes: int  # held on the device: parameters, and buffers for those that are not
    needs_seq_lens: bool  # of the attention backend: it plans each step on the host
    load_warnings: tuple[str, ...] = ()  # what made loading slower than it could be
    offloaded: OffloadedWeights | None = None  # None: all weights stay on the device

    def offload_use(self) -> OffloadUse | None:
        """How the offloaded weights came so far; None: there are none."""
        return None if self.offloaded is None else self.offloaded.use()

    def close(self) -> None:
        """Let go of what offloaded weights need; no step may run any more. Idempotent."""
        if self.offloaded is not None:
            self.offloaded.close()
        self.kv_memory.close()


def stage_bytes(plan: PipelinePlan, stage: StagePlan) -> dict[str, int]:
    """Bytes that each lane of this stage holds by what they are for, as planned."""
    spec = lane_spec(read_spec(Path(plan.model_path)), plan.tensor_parallel)
    page_bytes = kv_page_bytes(
        spec,
        plan.dtype,
        num_layers=stage.num_kv_device_layers,
        page_size_tokens=plan.page_size_tokens,
    )
    needs = {"weights": stage.device_weight_bytes, "KV cache": plan.num_kv_pages * page_bytes}
    if plan.num_host_pages and plan.device == "cpu":
        needs["KV pages of preempted sequences"] = plan.num_host_pages * page_bytes
    return needs


def load_parts(
    plan: PipelinePlan,
    stage: StagePlan,
    trust_remote_code: bool,
    device: torch.device,
    boot: BootTimeline,
    *,
    lanes: Lanes = ALONE,
    before_steps: Callable[[], object] = lambda: None,
) -> StageParts:
    """Build, fill and bind this rank's layers on `device`. Nothing of another stage is read.

    Its parts begin in `boot`. Trial steps at the end of it need the other `lanes` of the stage;
    `before_steps` is called before them.

    Raises:
        CheckpointError: the weights do not fit the model, or cannot be read.
        UnsupportedModelError: the family cannot be split.
        EnvironmentSetupError: the GPU's memory does not hold what was planned.
    """
    try:
        model = _built(plan, stage, trust_remote_code, lanes)
        return _load_parts(plan, stage, model, device, boot, before_steps=before_steps)
    except torch.OutOfMemoryError as error:
        raise EnvironmentSetupError(
            f"the GPU of stage {stage.stage} ({stage.host}) has too little memory for its weights "
            f"and KV cache ({str(error).splitlines()[0]}): most likely another process took some "
            "meanwhile; lower memory.gpu_memory_fraction or memory.kv_cache_bytes"
        ) from error


def _built(
    plan: PipelinePlan, stage: StagePlan, trust_remote_code: bool, lanes: Lanes
) -> StageModel:
    return build_stage_model(
        Path(plan.model_path),
        stage,
        dtype=getattr(torch, plan.dtype),
        backend=make_backend(plan.attention),
        max_sequence_tokens=plan.max_sequence_tokens,
        trust_remote_code=trust_remote_code,
        quantize=plan.quantize,
        lanes=lanes,
    )


def _load_parts(
    plan: PipelinePlan,
    stage: StagePlan,
    model: StageModel,
    device: torch.device,
    boot: BootTimeline,
    *,
    before_steps: Callable[[], object],
) -> StageParts:
    backend = model.backend
    tensors = stage_tensors(model)
    with ExitStack() as opened:
        offloaded = _open_offload(plan, stage, model, tensors, device)
        if offloaded is not None:
            opened.callback(offloaded.close)
        report = _load(model, plan, device, boot, offloaded)
        boot.begin("cache")
        kv_memory = open_kv_memory(plan, stage, device, head_major=backend.head_major)
        opened.callback(kv_memory.close)
        before_steps()
        boot.begin("convert weights")  # into the layout to compute with, after trial steps
        model.finish(kv_memory.cache, streamed=streamed_weights(offloaded, tensors))
        opened.pop_all()
    spared_bytes = 0 if offloaded is None else offloaded.spared_bytes
    weight_bytes, needs_lens = report.parameter_bytes - spared_bytes, backend.needs_seq_lens
    read_bytes, warnings = report.bytes_read, report.warnings
    return StageParts(model, kv_memory, read_bytes, weight_bytes, needs_lens, warnings, offloaded)


def stage_tensors(model: StageModel) -> StageTensors:
    """Of a stage that is not loaded yet."""
    state = model.module.state_dict(keep_vars=True)

    def named(names: list[str]) -> dict[str, torch.Tensor]:
        return {name: state[name] for name in names}

    return StageTensors(
        layers=tuple(named(names) for names in model.layer_names()),
        embedding=named(model.embedding_names()),
        head=named(model.head_names()),
        first_layer=model.plan.first_layer,
    )


def _open_offload(
    plan: PipelinePlan,
    stage: StagePlan,
    model: StageModel,
    tensors: StageTensors,
    device: torch.device,
) -> OffloadedWeights | None:
    """Where the plan wants weights to stand outside of `device`; None: nowhere."""
    if stage.offload is None:
        return None
    job = read_job(os.environ)
    owner = f"process-{os.getpid()}" if job is None else f"job-{job.label}"
    return open_offload(
        stage.offload,
        tensors,
        device,
        folder=plan.offload_dir,
        name=f"mpipipe-{owner}-rank-{stage.ranks[model.lanes.lane]}",
        use_graphs=plan.cuda_graphs and not model.graphs_unsupported_reason(),
    )


def streamed_weights(
    offloaded: OffloadedWeights | None, tensors: StageTensors
) -> StreamedWeights | None:
    """The loaded weights on their way to the device."""
    if offloaded is None:
        return None
    streams = offloaded.start(tensors.head)
    return StreamedWeights(
        gates=streams.gates or NO_GATES,
        layers=streams.layers,
        head_blocks=streams.head_blocks,
        embedding_rows=streams.embedding_rows,
        waits_on_host=streams.waits_on_host,
    )


def _load(
    model: StageModel,
    plan: PipelinePlan,
    device: torch.device,
    boot: BootTimeline,
    destination: Destination | None,
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
            destination=destination,
            shards=model.shards(),
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
        device=destination or device,
        shards=model.shards(),
    )
    boot.divide("convert weights", report.convert_s, report.bytes_read)
    return report
