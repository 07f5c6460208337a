"""From plans and step times to a simulated job and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mpipipe.metrics.summary import percentile
from mpipipe.scheduler.core import SchedulerCore
from mpipipe.simulation.followed_steps import FollowedSteps
from mpipipe.simulation.result import DispatchLoad, HeadLoad, SimulationResult, StageResult
from mpipipe.simulation.simulated_job import ReplicaParts, SimulatedJob
from mpipipe.simulation.simulated_requests import STOP_ID
from mpipipe.simulation.simulated_stages import SimulatedStages, StageUse
from mpipipe.simulation.stage_times import HeadTimes, StageTimes, StepWork

if TYPE_CHECKING:
    from mpipipe.metrics.accounting import StepRecord
    from mpipipe.metrics.lines import RequestRecord
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.simulation.simulated_requests import RequestLengths

__all__ = ["ReplicaPlan", "Simulation", "SimulationOptions", "num_representatives", "simulate_job"]

# What simulating takes, on one core: a step, its passage through a stage, a token, a request.
_STEP_S = 80e-6
_STAGE_S = 2e-6
_TOKEN_S = 0.3e-6
_REQUEST_S = 100e-6
_MOST_S = 4.0
_FEWEST_REPLICAS = 16
_PROBE = StepWork(rows=8, context_tokens=256, chunk_tokens=64, chunk_context_tokens=64)


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """One replica of the job: what runs where, and how long it takes."""

    plan: PipelinePlan
    times: StageTimes

    @property
    def capacity(self) -> int:
        """Sequences that it runs at once."""
        return self.plan.capacity

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal of replicas that take equal times for equal work."""
        plan = self.plan
        limits = (plan.num_slots, plan.max_sequences_per_slot, plan.max_tokens_per_step)
        times = (self.times.compute_s(_PROBE, -1), self.times.hops_s(1), self.times.ids_s)
        return (*limits, plan.num_kv_pages, plan.lookahead, plan.prefill, *times)

    def parts(self, *, with_stops: bool, launch_s: float, trace_steps: int) -> ReplicaParts:
        """A replica at its beginning."""
        plan = self.plan
        pads = plan.attention == "sdpa"
        reads_once = (pads and plan.device == "cpu") or plan.read_prefixes_once
        followed = FollowedSteps(
            plan.num_slots, pads=pads, shared_page_size=plan.shared_page_size * reads_once
        )
        stages = SimulatedStages(
            self.times,
            num_stages=plan.num_stages,
            followed=followed,
            in_stream=plan.device == "cuda",
            launch_s=launch_s if plan.device == "cuda" else 0.0,
            num_ranks=len(plan.ranks),
            keep_sequences=with_stops,
            trace_steps=trace_steps,
        )
        plan = replace(plan, drafts=None)  # tokens are made up: what recurs in them means nothing
        core = SchedulerCore.of_plan(plan, (STOP_ID,))
        return ReplicaParts(core, stages, self.capacity, plan.shared_page_size)


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """How to simulate."""

    head: HeadTimes
    num_simulated_replicas: int = 0  # 0: as many as can be simulated in seconds
    launch_s: float = 0.0  # of a GPU's host for each step
    trace_steps: int = 0  # the last steps of replica 0 of which records are kept


@dataclass(frozen=True, slots=True)
class Simulation:
    """A simulated job: what is said of it, and what happened in it."""

    result: SimulationResult
    records: dict[int, list[StepRecord]]  # the last steps of replica 0, by stage, if they are kept
    requests: list[RequestRecord]  # in the order of their ends


def num_representatives(
    replicas: Sequence[ReplicaPlan], requests: Sequence[RequestLengths], asked: int = 0
) -> int:
    """How many replicas are simulated: all; of many alike ones as many as take seconds.

    Args:
        replicas: all of them.
        requests: of the whole job.
        asked: so many; 0: choose.
    """
    if asked:
        return min(asked, len(replicas))
    plan = replicas[0].plan
    num_tokens = sum(request.num_output_tokens for request in requests)
    num_prompt_tokens = sum(request.num_prompt_tokens for request in requests)
    fitting = plan.num_kv_pages * plan.page_size_tokens * len(requests)
    fitting //= max(1, num_prompt_tokens + num_tokens) * plan.num_slots
    num_steps = num_tokens / max(1, min(plan.max_sequences_per_slot, fitting))
    num_steps += num_prompt_tokens / plan.max_tokens_per_step
    seconds = num_steps * (_STEP_S + plan.num_stages * _STAGE_S)
    seconds += num_tokens * _TOKEN_S + len(requests) * _REQUEST_S
    if seconds <= _MOST_S or len({replica.kind for replica in replicas}) > 1:
        return len(replicas)
    return min(len(replicas), max(_FEWEST_REPLICAS, int(len(replicas) * _MOST_S / seconds)))


def simulate_job(
    replicas: Sequence[ReplicaPlan],
    requests: Sequence[RequestLengths],
    options: SimulationOptions,
) -> Simulation:
    """Run `requests` through `replicas`.

    Of many alike replicas some stand for all, with their share of the requests: see
    `num_representatives`. Rank 0 then takes as much longer for each message.
    """
    num_simulated = num_representatives(replicas, requests, options.num_simulated_replicas)
    num_shared = -(-len(requests) * num_simulated // len(replicas))
    shared = [requests[i * len(requests) // num_shared] for i in range(num_shared)]
    with_stops = any(request.stops for request in shared)
    parts = [
        replica.parts(
            with_stops=with_stops,
            launch_s=options.launch_s,
            trace_steps=0 if number else options.trace_steps,
        )
        for number, replica in enumerate(replicas[:num_simulated])
    ]
    stands_for = len(requests) / num_shared
    job = SimulatedJob(
        parts, [request.request() for request in shared], options.head, stands_for=stands_for
    )
    job.run()
    records = {stage: list(kept) for stage, kept in enumerate(parts[0].stages.records)}
    result = _result(replicas, requests, job, parts, stands_for)
    return Simulation(result, records, job.records)


def _result(
    replicas: Sequence[ReplicaPlan],
    requests: Sequence[RequestLengths],
    job: SimulatedJob,
    parts: Sequence[ReplicaParts],
    stands_for: float,
) -> SimulationResult:
    records = [record for record in job.records if record.completion.error_kind is None]
    elapsed_s = max((record.finished_s for record in records), default=job.clock.now_s())
    if len(replicas) > 1:
        elapsed_s = max(elapsed_s, job.rank_0.free_s)  # it has been told of the last completion
    ttfts_s = [record.completion.ttft_s for record in records]
    latencies_s = [record.completion.latency_s for record in records]
    statistics = [part.core.statistics() for part in parts]
    ends_s = [replica.ended_s for replica in job.replicas]
    is_dispatched = len(replicas) > 1
    return SimulationResult(
        num_replicas=len(replicas),
        num_simulated_replicas=len(parts),
        num_stages=replicas[0].plan.num_stages,
        num_requests=len(requests),
        num_completed=round(len(records) * stands_for),
        num_prompt_tokens=sum(request.num_prompt_tokens for request in requests),
        num_output_tokens=sum(request.num_output_tokens for request in requests),
        elapsed_s=elapsed_s,
        num_steps=sum(now.num_steps for now in statistics),
        num_preemptions=sum(now.num_preemptions for now in statistics),
        num_recomputed_tokens=sum(now.num_recomputed_tokens for now in statistics),
        num_shared_tokens=sum(now.num_shared_tokens for now in statistics),
        ttft_p50_s=percentile(ttfts_s, 50),
        ttft_p95_s=percentile(ttfts_s, 95),
        latency_p50_s=percentile(latencies_s, 50),
        latency_p95_s=percentile(latencies_s, 95),
        replica_end_spread_s=max(ends_s) - min(ends_s),
        stages=_stages(replicas[0].plan, parts, elapsed_s),
        head=_head(job, elapsed_s),
        dispatch=_dispatch(job, len(requests), elapsed_s, stands_for) if is_dispatched else None,
        deadlocks=tuple(job.deadlocks()),
    )


def _stages(
    plan: PipelinePlan, parts: Sequence[ReplicaParts], elapsed_s: float
) -> tuple[StageResult, ...]:
    """By stage, the mean over the simulated replicas."""
    found = []
    for stage in plan.stages:
        uses = [part.stages.uses[stage.stage] for part in parts]
        compute_s, wait_s, transfer_s, send_s, steady_compute_s, steady_s = _means(uses)
        found.append(
            StageResult(
                stage=stage.stage,
                host=stage.host,
                num_layers=stage.num_layers,
                compute_s=compute_s,
                wait_s=wait_s,
                transfer_s=transfer_s,
                send_s=send_s,
                idle_s=max(0.0, elapsed_s - compute_s - wait_s - transfer_s - send_s),
                steady_bubble=1 - steady_compute_s / steady_s if steady_s > 0 else None,
            )
        )
    return tuple(found)


def _means(uses: Sequence[StageUse]) -> tuple[float, ...]:
    sums = [
        (
            use.compute_s,
            use.wait_s,
            use.transfer_s,
            use.send_s,
            use.steady_compute_s,
            use.steady_s,
        )
        for use in uses
    ]
    return tuple(sum(column) / len(uses) for column in zip(*sums, strict=True))


def _head(job: SimulatedJob, elapsed_s: float) -> HeadLoad:
    return HeadLoad(
        messages_per_s=job.sent.num_messages / elapsed_s,
        bytes_per_s=job.sent.num_bytes / elapsed_s,
        busy_share=(job.rank_0.busy_s - job.dispatched.busy_s) / elapsed_s,
    )


def _dispatch(
    job: SimulatedJob, num_requests: int, elapsed_s: float, stands_for: float
) -> DispatchLoad:
    messages = job.dispatched.messages
    num_messages = round(messages.num_messages * stands_for)
    num_bytes = round(messages.num_bytes * stands_for)
    return DispatchLoad(
        num_messages=num_messages,
        num_bytes=num_bytes,
        messages_per_s=num_messages / elapsed_s,
        bytes_per_s=num_bytes / elapsed_s,
        requests_per_s=num_requests / elapsed_s,
        busy_share=job.dispatched.busy_s / elapsed_s,
        longest_queue_s=job.dispatched.longest_queue_s,
    )
