"""The worker of a stage, with its stream, engine and tensor channel. Part of `boot`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from mpipipe.errors import EnvironmentSetupError
from mpipipe.runtime.ranks import in_phase
from mpipipe.stage.assembly import open_engine, open_stream
from mpipipe.stage.engine import StageEngine
from mpipipe.stage.step_times import StepTimesLink
from mpipipe.stage.timeline import StreamTimeline
from mpipipe.stage.worker import StageWorker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mpipipe.data_plane.channel import TensorChannel
    from mpipipe.metrics.accounting import StageAccount
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.runtime.clock_offsets import Clocks
    from mpipipe.runtime.loading import StageParts
    from mpipipe.runtime.ranks import Ranks
    from mpipipe.runtime.tensor_channel import Links
    from mpipipe.stage.profiling import Profiler
    from mpipipe.stage.ranges import Ranges
    from mpipipe.stage.stream import Stream

__all__ = ["OpenedWorker", "open_worker"]


@dataclass(frozen=True, slots=True)
class OpenedWorker:
    """A worker, and what making it ready took."""

    worker: StageWorker
    capture_s: float | None  # trial steps and CUDA graphs; None: nothing is captured
    num_graphs: int  # of decode steps


@asynccontextmanager
async def open_worker(
    plan: PipelinePlan,
    ranks: Ranks,
    parts: StageParts,
    *,
    linking: Callable[[], Awaitable[Links]],
    account: StageAccount,
    clocks: Clocks,
    device: torch.device,
    profiler: Profiler,
) -> AsyncIterator[OpenedWorker]:
    """The stage's worker, ready but for its edges; all ranks of all replicas call it together.

    `linking` gives the links to other ranks; their channel is closed with the worker, as is
    `profiler`, which is told what it does.

    Raises:
        AgreedError: the memory of some rank's GPU does not hold the work space.
        EnvironmentSetupError: the transport cannot be set up on some rank.
    """
    ranks.boot.begin("warm-up")
    preparing = partial(_prepare, plan, ranks, parts, device, profiler)
    ready = await in_phase(ranks, "capture", preparing)
    stream, engine = ready.stream, ready.engine
    stream.enter()  # captured in the phase's thread, launched from this one
    ranks.boot.begin("edges")
    with ExitStack() as let_go:
        let_go.callback(stream.close)
        links = await linking()
        channel = profiler.channel(links.channel)
        timeline = StreamTimeline(stream, account, ranks.clock, _link(plan, ranks, account, clocks))
        worker = _make_worker(plan, ranks, ready, channel, timeline, ranges=profiler, parts=parts)
        let_go.callback(links.let_go)
        capture_s = ready.seconds if engine.graph_runner.use_graphs else None
        yield OpenedWorker(worker, capture_s, engine.graph_runner.num_graphs)
        await profiler.aclose()
        stream.release_captured()
        await channel.aclose()


def _make_worker(
    plan: PipelinePlan,
    ranks: Ranks,
    ready: _Ready,
    channel: TensorChannel,
    timeline: StreamTimeline,
    *,
    ranges: Ranges,
    parts: StageParts,
) -> StageWorker:
    return StageWorker(
        plan=plan,
        stage=plan.stage_of_rank(ranks.mesh.rank),
        mesh=ranks.mesh,
        channel=channel,
        engine=ready.engine,
        stream=ready.stream,
        timeline=timeline,
        progress=ranks.engine,
        clock=ranks.clock,
        ranges=ranges,
        offload_use=parts.offload_use,
    )


def _link(
    plan: PipelinePlan, ranks: Ranks, account: StageAccount, clocks: Clocks
) -> StepTimesLink | None:
    """To the stages before and behind this rank's; None: it is the only one."""
    if plan.num_stages == 1:
        return None
    stage = plan.stage_of_rank(ranks.mesh.rank)
    return StepTimesLink(
        plan,
        stage.stage,
        lane=stage.ranks.index(ranks.mesh.rank),
        mesh=ranks.mesh,
        account=account,
        clock=ranks.clock,
        ahead_s=clocks.ahead_s,
    )


@dataclass(frozen=True, slots=True)
class _Ready:
    """A stream with an engine whose graphs are ready."""

    stream: Stream
    engine: StageEngine
    seconds: float


def _prepare(
    plan: PipelinePlan, ranks: Ranks, parts: StageParts, device: torch.device, profiler: Profiler
) -> _Ready:
    """Open the device's stream, run and capture the stage's graphs.

    Raises:
        EnvironmentSetupError: the GPU's memory does not hold the work space.
    """
    stream = open_stream(
        device,
        ranks.clock,
        ranks.engine,
        num_threads=plan.threads_per_rank,
        waits_on_host=parts.model.waits_on_host,
    )
    engine = open_engine(
        plan,
        parts.model,
        parts.kv_memory.cache,
        stream,
        attention_needs_seq_lens=parts.needs_seq_lens,
        ranges=profiler,
        host_memory=parts.kv_memory.host_memory,
    )
    started_s = ranks.clock.now_s()
    try:
        engine.prepare(plan.sampling, capturing=lambda: ranks.boot.begin("capture"))
    except torch.OutOfMemoryError as error:
        raise EnvironmentSetupError(
            f"the GPU of rank {ranks.mesh.rank} has too little memory for a step of "
            f"{plan.max_tokens_per_step} tokens beside weights and KV cache "
            f"({str(error).splitlines()[0]}): lower memory.gpu_memory_fraction, "
            "memory.kv_cache_bytes or pipeline.max_tokens_per_step"
        ) from error
    seconds = ranks.clock.now_s() - started_s
    profiler.prepare()
    return _Ready(stream, engine, seconds)
