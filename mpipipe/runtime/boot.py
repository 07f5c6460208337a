"""From a configuration that was read to a live session: the only place that wires the parts.

The order is the same on all ranks, and each step ends in an agreement: plan (head), load, open the
tensor channel, exercise every edge once. Imports torch and transformers: seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mpipipe.data_plane.loopback import open_loopback_channels
from mpipipe.metrics.accounting import StageAccount
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.resolve import make_plan
from mpipipe.runtime.inputs import ModelFacts, Workload, deepspeed_warnings
from mpipipe.runtime.launch import PHASE_DEADLINE_S, Ranks, in_phase
from mpipipe.runtime.load import StageParts, load_parts
from mpipipe.runtime.session import LoadFacts, Session
from mpipipe.stage.executor import StageExecutor
from mpipipe.stage.worker import StageWorker
from mpipipe.topology.host import peak_rss_bytes

if TYPE_CHECKING:
    from mpipipe.config.load import LoadedConfig
    from mpipipe.control_plane.messages import Hello
    from mpipipe.data_plane.channel import TensorChannel
    from mpipipe.metrics.log import Logger
    from mpipipe.models.tokenizer import Tokenizer

__all__ = ["Boot", "open_session"]


@dataclass(frozen=True, slots=True)
class Boot:
    """What a session starts from. `model` and `tokenizer` are the head's, None elsewhere."""

    ranks: Ranks
    loaded: LoadedConfig
    hellos: tuple[Hello, ...]
    model: ModelFacts | None
    tokenizer: Tokenizer | None
    workload: Workload
    log: Logger


@asynccontextmanager
async def open_session(boot: Boot) -> AsyncIterator[Session]:
    """Plan, load, connect.

    Raises:
        AgreedError: the plan or the load failed on some rank.
    """
    ranks = boot.ranks
    plan = await _agree_on_plan(boot)
    for entry in plan.resolved:
        boot.log.info("resolved", setting=entry.setting, value=entry.value, reason=entry.reason)
    stage = plan.stage_of_rank(ranks.mesh.rank)
    torch.set_num_threads(plan.threads_per_rank)
    started_s, baseline_rss_bytes = ranks.clock.now_s(), peak_rss_bytes()
    trust_remote_code = boot.loaded.config.model.trust_remote_code
    parts = await in_phase(ranks, "load", lambda: load_parts(plan, stage, trust_remote_code))
    channel = _open_channel(plan, ranks)
    account = StageAccount(stage.stage)
    threads = ThreadPoolExecutor(
        1, "compute", initializer=torch.set_num_threads, initargs=(plan.threads_per_rank,)
    )
    with threads as thread:
        worker = _make_worker(plan, ranks, parts, channel=channel, thread=thread, account=account)
        await worker.exercise_edges()
        await ranks.mesh.barrier("ready", PHASE_DEADLINE_S)
        load = LoadFacts(
            load_s=ranks.clock.now_s() - started_s,
            loaded_bytes=parts.loaded_bytes,
            weight_bytes=parts.weight_bytes,
            kv_bytes=parts.cache.num_bytes(),
            baseline_rss_bytes=baseline_rss_bytes,
        )
        boot.log.info("ready", plan=dataclasses.asdict(stage), load=dataclasses.asdict(load))
        yield Session(boot, plan=plan, worker=worker, account=account, load=load)
        await channel.aclose()


async def _agree_on_plan(boot: Boot) -> PipelinePlan:
    """The head plans, everybody gets the same plan."""
    ranks = boot.ranks
    plan = await in_phase(ranks, "plan", lambda: _decide(boot))
    text = None if plan is None else plan.to_json().encode()
    received = await ranks.mesh.broadcast("plan", text, PHASE_DEADLINE_S)
    return PipelinePlan.from_json(received.decode())


def _decide(boot: Boot) -> PipelinePlan | None:
    if boot.model is None:
        return None
    plan = make_plan(
        boot.loaded.config,
        boot.model.spec,
        boot.hellos,
        str(boot.model.folder),
        longest_request_tokens=boot.workload.longest_request_tokens,
        num_requests=boot.workload.num_requests,
    )
    deepspeed_warnings(boot.loaded, plan)  # a contradiction must stop the run before it loads
    return plan


def _open_channel(plan: PipelinePlan, ranks: Ranks) -> TensorChannel:
    if plan.transport == "loopback":
        return open_loopback_channels(1)[0]
    from mpipipe.data_plane.mpi import open_mpi_channel

    return open_mpi_channel(ranks.engine)


def _make_worker(
    plan: PipelinePlan,
    ranks: Ranks,
    parts: StageParts,
    *,
    channel: TensorChannel,
    thread: Executor,
    account: StageAccount,
) -> StageWorker:
    stage = plan.stage_of_rank(ranks.mesh.rank)
    executor = StageExecutor(
        parts.model,
        parts.cache,
        page_size=plan.page_size_tokens,
        is_last=stage.has_head,
        clock=ranks.clock,
    )
    return StageWorker(
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
