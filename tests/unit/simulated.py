"""Small simulated jobs for tests: cores with given limits over scripted stages."""

from __future__ import annotations

from collections.abc import Sequence

from mpipipe.control_plane.messages import DecodeScheduled, StepScheduled
from mpipipe.scheduler.core import SchedulerCore, SchedulerLimits
from mpipipe.simulation.followed_steps import FollowedSteps
from mpipipe.simulation.simulated_job import ReplicaParts, SimulatedJob
from mpipipe.simulation.simulated_requests import STOP_ID, RequestLengths
from mpipipe.simulation.simulated_stages import SimulatedStages
from mpipipe.simulation.stage_times import HeadTimes, ScriptedTimes, StageTimes
from mpipipe.types import PrefillMode

__all__ = ["WithholdingCore", "alike", "made_parts", "run_job", "uniform"]

NO_TIME = HeadTimes()


def alike(num_requests: int, prompt: int, output: int, limit: int = 0) -> list[RequestLengths]:
    """Requests of equal lengths; `limit`: their max_new_tokens, where they stop before it."""
    return [RequestLengths(i, prompt, limit or output, output) for i in range(num_requests)]


def made_parts(
    times: StageTimes,
    *,
    num_stages: int,
    rows: int = 4,
    lookahead: int = 0,
    prefill: PrefillMode | None = None,
    num_pages: int = 10_000,
    tokens_per_step: int = 512,
    num_host_pages: int = 0,
    launch_s: float = 0.0,
    core_type: type[SchedulerCore] = SchedulerCore,
) -> ReplicaParts:
    """A replica with a slot for each stage; with lookahead it works as on GPUs, else as on CPUs."""
    limits = SchedulerLimits(
        num_slots=num_stages,
        max_sequences_per_slot=rows,
        max_tokens_per_step=tokens_per_step,
        num_pages=num_pages,
        page_size=16,
        max_context_tokens=4096,
        lookahead=lookahead,
        num_host_pages=num_host_pages,
    )
    stages = SimulatedStages(
        times,
        num_stages=num_stages,
        followed=FollowedSteps(num_stages),
        in_stream=lookahead > 0,
        launch_s=launch_s,
        keep_sequences=True,
    )
    prefill = prefill or ("phases" if lookahead else "mixed")
    core = core_type(limits, eos_token_ids=(STOP_ID,), prefill=prefill)
    return ReplicaParts(core, stages, num_stages * rows)


def run_job(
    parts: ReplicaParts | Sequence[ReplicaParts],
    requests: Sequence[RequestLengths],
    head: HeadTimes = NO_TIME,
) -> SimulatedJob:
    """The job after its end."""
    replicas = [parts] if isinstance(parts, ReplicaParts) else parts
    job = SimulatedJob(replicas, [request.request() for request in requests], head)
    job.run()
    return job


def uniform(num_stages: int, step_s: float = 0.01, hop_s: float = 0.0) -> ScriptedTimes:
    """Stages that take equally long for a decode step, and nothing for prompts."""
    return ScriptedTimes((step_s,) * num_stages, hop_s=hop_s)


class WithholdingCore(SchedulerCore):
    """A scheduler with a bug: it sends nothing more after ten steps."""

    def next_step(self) -> StepScheduled | DecodeScheduled | None:
        return None if self.statistics().num_steps >= 10 else super().next_step()
