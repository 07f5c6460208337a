"""From what was prepared to a live session: the only place that wires the parts.

The order is the same on all ranks, and each step ends in an agreement: plan (head), load, open the
tensor channel, exercise every edge once. Imports torch and transformers: seconds. `startup`
does what comes before.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import torch

from mpipipe.abandoned import is_abandoned_work_running
from mpipipe.data_plane.lanes import ALONE
from mpipipe.metrics.accounting import StageAccount
from mpipipe.plain_values import from_json, to_json
from mpipipe.planning.compiled_kernels import stages_on_host
from mpipipe.planning.job_plan import plan_job
from mpipipe.planning.plan import PipelinePlan, StagePlan
from mpipipe.planning.resolve import deepspeed_warnings
from mpipipe.runtime.clock_offsets import compared_clocks
from mpipipe.runtime.late_kernels import late_kernels_told
from mpipipe.runtime.loading import StageParts, load_parts, stage_bytes
from mpipipe.runtime.offload_folder import offload_need, prepare_offload_folder
from mpipipe.runtime.ranks import PHASE_DEADLINE_S, Ranks, in_phase, told_by_head
from mpipipe.runtime.session import Boot, LoadFacts, Session
from mpipipe.runtime.stage_worker import OpenedWorker, open_worker
from mpipipe.runtime.tensor_channel import Links, open_links
from mpipipe.stage.profiling import Profiler, open_profiler
from mpipipe.topology.host import format_cpus, peak_rss_bytes

__all__ = ["limit_memory", "open_session"]


@asynccontextmanager
async def open_session(boot: Boot) -> AsyncIterator[Session]:
    """Plan, load, connect.

    Raises:
        AgreedError: the plan or the load failed on some rank.
    """
    ranks = boot.ranks
    ranks.boot.begin("plan")
    plans = await _agree_on_plans(boot)
    plan = _own(boot, plans)
    stage = plan.stage_of_rank(ranks.mesh.rank)
    device = _device_of(boot, plan)
    _order_kernels(boot, plans, device)
    started_s, baseline_rss_bytes = ranks.clock.now_s(), peak_rss_bytes()
    limit_memory(boot.loaded.config.memory.device_bytes, device)
    with ExitStack() as opened_parts:
        linking = partial(open_links, plans, boot.hosts, ranks, device)
        links = await _links_for_loading(plan, ranks, linking, opened_parts)
        if links is not None:
            linking = partial(_given, links)
        parts = await _load(boot, plans, stage, device, opened_parts, links=links)
        _use_device(plan, device)  # this thread's too: look-ahead launches steps from here
        account = StageAccount(stage.stage)
        ranks.vitals.stage = stage.stage
        opening = partial(open_worker, plan, ranks, parts, device=device, linking=linking)
        async with (
            compared_clocks(ranks, boot.hosts, ranks.clock.now_s) as clocks,
            opening(account=account, clocks=clocks, profiler=_profiler(boot)) as opened,
        ):
            limit_memory("auto", device)
            await opened.worker.exercise_edges()
            ranks.boot.begin("ready")
            await clocks.compare()
            _settle_garbage()
            with ranks.boot.waiting("ready"):
                await ranks.mesh.barrier("ready", PHASE_DEADLINE_S)
            ranks.boot.end()
            load = _load_facts(parts, opened, ranks.boot.own_s(started_s), baseline_rss_bytes)
            _log_ready(boot, plan, parts, load, opened)
            ranks.vitals.last_step = lambda: account.last_step
            own = partial(Session, boot, plan=plan, plans=plans, worker=opened.worker)
            with _ready(boot):
                yield own(account=account, clocks=clocks, load=load)


@contextmanager
def _ready(boot: Boot) -> Iterator[None]:
    """From the end of the boot on: kernels that are compiled are late, garbage is set aside."""
    try:
        with late_kernels_told(boot.log):
            yield
    finally:
        gc.unfreeze()


async def _links_for_loading(
    plan: PipelinePlan,
    ranks: Ranks,
    linking: Callable[[], Awaitable[Links]],
    opened: ExitStack,
) -> Links | None:
    """The links to other ranks, where lanes need each other while they load."""
    if plan.tensor_parallel == 1:
        return None
    ranks.boot.begin("edges")
    links = await linking()
    opened.callback(links.let_go)
    return links


async def _given(links: Links) -> Links:
    return links


async def _load(
    boot: Boot,
    plans: Sequence[PipelinePlan],
    stage: StagePlan,
    device: torch.device,
    opened: ExitStack,
    *,
    links: Links | None,
) -> StageParts:
    """The stage's parts, which are closed with `opened`, also where another rank's load fails."""
    ranks, trust_remote_code = boot.ranks, boot.loaded.config.model.trust_remote_code
    plan = _own(boot, plans)

    def load_stage() -> StageParts:
        ranks.memory_needs.update(stage_bytes(plan, stage))
        _use_device(plan, device)
        lanes = ALONE if links is None else links.lanes
        parts = load_parts(
            plan,
            stage,
            trust_remote_code,
            device,
            ranks.boot,
            lanes=lanes,
            before_steps=partial(_await_kernels, boot),
        )
        opened.callback(_close, parts)
        return parts

    await _prepare_offload(ranks, plans, stage)
    ranks.boot.begin("build")
    parts = await in_phase(ranks, "load", load_stage)
    for warning in parts.load_warnings:
        boot.log.warning("loading", message=warning)
    return parts


def _order_kernels(boot: Boot, plans: Sequence[PipelinePlan], device: torch.device) -> None:
    """Let the kernels of this host be compiled, while its ranks load."""
    if boot.kernels is None or device.type != "cuda":
        return
    plan, host = _own(boot, plans), boot.hosts[boot.ranks.mesh.rank]  # other replicas' are alike
    properties = torch.cuda.get_device_properties(device)
    boot.kernels.order(
        plan,
        stages_on_host(plan, host),
        (properties.major, properties.minor),
        properties.multi_processor_count,
    )


def _await_kernels(boot: Boot) -> None:
    """Until what this host's stages launch is compiled: before its first rank launches some."""
    if boot.kernels is None:
        return
    boot.ranks.boot.begin("kernels")
    compiled = boot.kernels.wait()
    if compiled is not None:
        boot.log.info("kernels", **dataclasses.asdict(compiled))


async def _prepare_offload(ranks: Ranks, plans: Sequence[PipelinePlan], stage: StagePlan) -> None:
    """A phase of all ranks where some stage of some replica keeps weights on a disk."""
    folders = {plan.offload_dir for plan in plans if plan.offload_dir}
    for folder in folders:  # one, as the configuration has one
        needed_bytes, who = offload_need([s for plan in plans for s in plan.stages], stage)
        prepare = partial(prepare_offload_folder, Path(folder), needed_bytes, who=who)
        await in_phase(ranks, "offload folder", prepare)


def _close(parts: StageParts) -> None:
    """Let go of `parts`; those that abandoned work may still use last as long as the process."""
    if not is_abandoned_work_running():
        parts.close()


def _load_facts(
    parts: StageParts, opened: OpenedWorker, load_s: float, baseline_rss_bytes: int
) -> LoadFacts:
    return LoadFacts(
        load_s=load_s,
        loaded_bytes=parts.loaded_bytes,
        weight_bytes=parts.weight_bytes,
        kv_bytes=parts.kv_memory.cache.num_bytes(),
        kv_host_bytes=parts.kv_memory.host_bytes,
        baseline_rss_bytes=baseline_rss_bytes,
        capture_s=opened.capture_s,
    )


def _profiler(boot: Boot) -> Profiler:
    """What watches this rank's stage."""
    config, rank = boot.loaded.config, boot.ranks.mesh.rank
    return open_profiler(config.profile, os.environ, folder=boot.folder, rank=rank, log=boot.log)


def _log_ready(
    boot: Boot, plan: PipelinePlan, parts: StageParts, load: LoadFacts, opened: OpenedWorker
) -> None:
    if parts.offloaded is not None and parts.offloaded.warning:
        boot.log.warning("offload", message=parts.offloaded.warning)
    if parts.kv_memory.warning:
        boot.log.warning("kv_memory", message=parts.kv_memory.warning)
    boot.log.info(
        "ready",
        plan=dataclasses.asdict(plan.stage_of_rank(boot.ranks.mesh.rank)),
        lane=plan.lane_of_rank(boot.ranks.mesh.rank),
        load=dataclasses.asdict(load),
        cpus=format_cpus(os.sched_getaffinity(0)),
        form=parts.model.mode,
        form_reason=parts.model.mode_reason,
        num_graphs=opened.num_graphs,
        graph_unsupported_reason=parts.model.graphs_unsupported_reason()
        if plan.device == "cuda"
        else "",
    )


def _settle_garbage() -> None:
    """Keep the garbage collector from looking at what stays until the end anyway.

    Measured: 360,000 objects of torch, transformers and ours, 0.14 s for a full collection, which
    comes in the middle of a step. Undone by `gc.unfreeze`.
    """
    gc.collect()
    gc.freeze()


def _device_of(boot: Boot, plan: PipelinePlan) -> torch.device:
    """The device of this rank."""
    if plan.device != "cuda":
        return torch.device(plan.device)
    return torch.device("cuda", boot.resources[boot.ranks.mesh.rank].gpu.index)


def _use_device(plan: PipelinePlan, device: torch.device) -> None:
    """Make `device` the current one of this thread, with the plan's number of compute threads."""
    torch.set_num_threads(plan.threads_per_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def limit_memory(device_bytes: int | str, device: torch.device) -> None:
    """Hold torch's allocator to `memory.device_bytes`, where that is a size, on a GPU.

    While a stage is loaded it then frees what it keeps for later before it takes more. Without:
    22.1 GiB at once where 16 GB were allowed, as merged weights do not fit into the blocks of their
    parts. Not while steps run: at the limit each step of prompts would free and take memory, 92 ms
    instead of 20 on two H100.
    """
    if device.type != "cuda":
        return
    share = 1.0
    if isinstance(device_bytes, int):
        share = min(1.0, device_bytes / torch.cuda.get_device_properties(device).total_memory)
    torch.cuda.set_per_process_memory_fraction(share, device)


async def _agree_on_plans(boot: Boot) -> tuple[PipelinePlan, ...]:
    """The head plans, all ranks get the same plans of all replicas."""
    told = await told_by_head(boot.ranks, "plan", lambda: to_json(_decide(boot)).encode())
    plans = tuple(from_json(list[PipelinePlan], told))
    plan = _own(boot, plans)
    boot.log.debug("planned", **dataclasses.asdict(plan))
    for entry in plan.resolved:
        boot.log.info("resolved", setting=entry.setting, value=entry.value, reason=entry.reason)
    return plans


def _own(boot: Boot, plans: Sequence[PipelinePlan]) -> PipelinePlan:
    """That of this rank's replica."""
    return plans[boot.layout.place_of(boot.ranks.mesh.rank).replica]


def _decide(boot: Boot) -> tuple[PipelinePlan, ...]:
    assert boot.model is not None, "the head plans"
    plans = plan_job(
        boot.loaded.config,
        boot.model.spec,
        boot.resources,
        str(boot.model.folder),
        boot.prepared.workload,
        notes=boot.model.notes,
        layout=boot.layout,
    )
    deepspeed_warnings(boot.loaded, plans[0])  # a contradiction must stop the run before it loads
    return plans
