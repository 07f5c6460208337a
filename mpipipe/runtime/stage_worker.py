"""Which worker runs a stage: one that awaits every token, or one that is launched ahead.

Both serve `generate` calls in the same way; the plan's `laps_ahead` decides. Part of `boot`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from mpipipe.errors import EnvironmentSetupError
from mpipipe.stage.ahead.assembly import open_engine
from mpipipe.stage.ahead.engine import AheadEngine
from mpipipe.stage.ahead.lane import Lane, open_lane
from mpipipe.stage.ahead.timeline import LaneTimeline
from mpipipe.stage.ahead.worker import AheadWorker
from mpipipe.stage.executor import StageExecutor
from mpipipe.stage.worker import StageWorker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpipipe.data_plane.channel import TensorChannel
    from mpipipe.metrics.accounting import StageAccount
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.runtime.loading import StageParts
    from mpipipe.runtime.ranks import Ranks
    from mpipipe.stage.device_use import DeviceUse

__all__ = ["AheadParts", "Worker", "ahead_worker", "awaiting_worker", "prepare_ahead"]


class Worker(Protocol):
    """What a session asks of its stage."""

    async def serve(self) -> bool:
        """Run steps until the head ends this generate call; False: the head ended the session."""
        ...

    async def exercise_edges(self) -> None:
        """Send one small tensor over every edge of this stage."""
        ...

    def device_use(self) -> DeviceUse:
        """What the stage has used of its device and of Python so far."""
        ...


@contextmanager
def awaiting_worker(
    plan: PipelinePlan,
    ranks: Ranks,
    parts: StageParts,
    *,
    channel: TensorChannel,
    account: StageAccount,
) -> Iterator[StageWorker]:
    """A stage that computes in a thread and waits for each result: CPUs."""
    stage = plan.stage_of_rank(ranks.mesh.rank)
    executor = StageExecutor(
        parts.model,
        parts.cache,
        page_size=plan.page_size_tokens,
        is_last=stage.has_head,
        clock=ranks.clock,
    )
    threads = ThreadPoolExecutor(
        1, "compute", initializer=torch.set_num_threads, initargs=(plan.threads_per_rank,)
    )
    with threads as thread:
        yield StageWorker(
            plan=plan,
            stage=stage,
            mesh=ranks.mesh,
            channel=channel,
            executor=executor,
            thread=thread,
            engine=ranks.engine,
            account=account,
            clock=ranks.clock,
            dtype=getattr(torch, plan.dtype),
        )


@dataclass(frozen=True, slots=True)
class AheadParts:
    """A lane with an engine whose programs are ready."""

    lane: Lane
    engine: AheadEngine
    capture_s: float


def prepare_ahead(
    plan: PipelinePlan, ranks: Ranks, parts: StageParts, device: torch.device
) -> AheadParts:
    """Open the device's lane, run and capture the stage's programs.

    Raises:
        EnvironmentSetupError: the GPU's memory does not hold the work space.
    """
    lane = open_lane(device, ranks.clock)
    engine = open_engine(plan, parts.model, lane, attention_needs_seq_lens=parts.needs_seq_lens)
    started_s = ranks.clock.now_s()
    try:
        engine.prepare(plan.sampling)
    except torch.OutOfMemoryError as error:
        raise EnvironmentSetupError(
            f"the GPU of rank {ranks.mesh.rank} has too little memory for a step of "
            f"{plan.max_tokens_per_step} tokens beside weights and KV cache "
            f"({str(error).splitlines()[0]}): lower memory.gpu_memory_fraction, "
            "memory.kv_cache_bytes or pipeline.max_tokens_per_step"
        ) from error
    return AheadParts(lane, engine, ranks.clock.now_s() - started_s)


def ahead_worker(
    plan: PipelinePlan,
    ranks: Ranks,
    ahead: AheadParts,
    *,
    channel: TensorChannel,
    account: StageAccount,
) -> AheadWorker:
    """A stage that is launched ahead of its results: GPUs."""
    return AheadWorker(
        plan=plan,
        stage=plan.stage_of_rank(ranks.mesh.rank),
        mesh=ranks.mesh,
        channel=channel,
        engine=ahead.engine,
        lane=ahead.lane,
        timeline=LaneTimeline(ahead.lane, account),
        progress=ranks.engine,
        clock=ranks.clock,
    )
