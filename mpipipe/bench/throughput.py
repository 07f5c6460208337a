"""`mpipipe bench throughput`: timed generate calls over one session, on the ranks of this launch.

All ranks run this and make the same calls in the same order; the head measures and reports. Random
token ids, greedy, past any end-of-sequence token; no tokenizer and, with random weights, no files
but `config.json`. Every work is warmed up outside the clock.
"""

from __future__ import annotations

import dataclasses
import gc
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mpipipe.bench.environment import environment
from mpipipe.bench.workloads import (
    BenchWork,
    bench_requests,
    bench_workload,
    least_warm_up_requests,
    warm_up_requests,
)
from mpipipe.checkpoint.vocabulary import Vocabulary
from mpipipe.config.load import load_config
from mpipipe.config.schema import AUTO
from mpipipe.errors import ConfigError
from mpipipe.metrics.log import NullLog
from mpipipe.metrics.throughput import FloorTimes, JobTiming, reports_since, throughput_record
from mpipipe.planning.roofline import JobShape, ceilings_of, job_floor
from mpipipe.runtime.ranks import in_phase
from mpipipe.runtime.requests import Prepared
from mpipipe.runtime.startup import joined_ranks, loaded_session

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mpipipe.clock import Clock
    from mpipipe.config.load import LoadedConfig
    from mpipipe.metrics.predicted import Prediction
    from mpipipe.metrics.summary import RankReport
    from mpipipe.planning.model_facts import ModelFacts
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.runtime.session import Session
    from mpipipe.types import Completion, Request

__all__ = ["ThroughputOptions", "ThroughputView", "run_throughput"]

_DEADLINE_S = 600.0
_PROFILE_STEPS = 50
_PROFILE_OUTPUT_TOKENS = 100  # of every sequence: more than the profiled and skipped steps together


@dataclass(frozen=True, slots=True)
class ThroughputOptions:
    """What to measure; the same on every rank."""

    works: tuple[BenchWork, ...]
    latency: bool = False  # every work must run as one batch
    repeat: int = 1
    seed: int = 0
    trace: Path | None = None
    trace_steps: int = 50
    profile: Path | None = None
    command: str = ""  # as typed, for the record


class ThroughputView(Protocol):
    """What the head shows; called on the head only."""

    def planned(self, plan: PipelinePlan) -> None:
        """The plan is agreed and every stage loaded."""

    def measured(self, record: dict[str, Any]) -> None:
        """One timed call is over."""


async def run_throughput(
    config_path: Path,
    overrides: Sequence[str],
    options: ThroughputOptions,
    view: ThroughputView,
    clock: Clock,
    *,
    started_s: float,
    debug: bool,
) -> None:
    """Boot, warm up, measure every work `repeat` times.

    Raises:
        MpipipeError: what `mpipipe run` would refuse, or a work that the plan cannot hold.
    """

    def load() -> LoadedConfig:
        return _with_drafts_asked(load_config(config_path, overrides), options.works)

    def check(model: ModelFacts) -> None:
        _check_lengths(model, options)

    workload = bench_workload(options.works, options.seed)

    def prepare(_: ModelFacts) -> Prepared:
        return Prepared(workload, decode=_no_text)

    async with (
        joined_ranks(clock, load, check, expect=lambda *_: workload, debug=debug) as joined,
        loaded_session(joined, prepare, NullLog(), text=prepare) as (session, _),
    ):
        ended_s = joined.ranks.phase_ended_s
        marks = _Marks(started_s, ended_s["model seen"], ended_s["import"], clock.now_s())
        await _Bench(session, joined.model, options, view, marks).run()


@dataclass(slots=True)
class _Marks:
    """When the boot's phases ended, in seconds of the clock."""

    started_s: float  # of the process
    greeted_s: float  # ranks met, input read
    imported_s: float  # torch and transformers
    loaded_s: float  # every stage ready, graphs captured
    first_token_s: float = 0.0  # of the first warm-up
    measuring_s: float = 0.0  # the latest timed call began

    def record(self, reports: Sequence[RankReport]) -> dict[str, float | None]:
        captures_s = [report.capture_s for report in reports if report.capture_s is not None]
        return {
            "greet_s": self.greeted_s - self.started_s,
            "import_s": self.imported_s - self.greeted_s,
            "load_s": self.loaded_s - self.imported_s,  # planning, weights, graphs
            "capture_s": max(captures_s, default=None),  # a part of load_s
            "first_token_s": self.first_token_s - self.started_s,
        }


@dataclass(frozen=True, slots=True)
class _Bench:
    """One rank's part in the measurements."""

    session: Session
    model: ModelFacts | None  # on the head
    options: ThroughputOptions
    view: ThroughputView
    marks: _Marks

    async def run(self) -> None:
        """Warm up, measure, look inside."""
        options, session = self.options, self.session
        await in_phase(session.ranks, "works", self._check_works)
        if session.is_head:
            self.view.planned(session.plan)
        for work in options.works:
            await self._warm_up(work)
        for work in options.works:
            for _ in range(options.repeat):
                await self._measure(work)
        if options.trace is not None:
            from mpipipe.bench.timeline import write_trace

            await write_trace(
                session, options.trace, options.trace_steps, since_s=self.marks.measuring_s
            )
        if options.profile is not None:
            await self._profile(options.profile)

    def _check_works(self) -> None:
        """What only the plan tells."""
        for work in self.options.works:
            if self.options.latency and work.num_prompts > self._num_places:
                raise ConfigError(
                    f"--latency measures one batch, and {work.name} has more prompts than the "
                    f"{self._num_places} sequences that run at once: lower the prompts, or raise "
                    "pipeline.max_sequences_per_slot"
                )

    @property
    def _num_places(self) -> int:
        return sum(plan.capacity for plan in self.session.plans)

    def _requests(self, work: BenchWork, *, warm_up: bool) -> list[Request]:
        if self.model is None:
            return []
        vocabulary = Vocabulary.of(self.model.folder, self.model.spec)
        seed = self.options.seed
        stages = [stage for plan in self.session.plans for stage in plan.stages]
        if warm_up and any(stage.offload and stage.offload.reads_disk for stage in stages):
            return least_warm_up_requests(work, vocabulary, seed)
        if warm_up:
            return warm_up_requests(work, vocabulary, seed, num_running=self._num_places)
        return bench_requests(work, vocabulary, seed)

    async def _warm_up(self, work: BenchWork) -> None:
        started_s = self.session.ranks.clock.now_s()
        completions = await self._generate(self._requests(work, warm_up=True))
        if completions and not self.marks.first_token_s:
            first_s = min(completion.ttft_s for completion in completions)
            self.marks.first_token_s = started_s + first_s

    async def _measure(self, work: BenchWork) -> None:
        session, clock = self.session, self.session.ranks.clock
        requests = self._requests(work, warm_up=False)
        before = await session.gather_reports()
        gc.collect()
        await session.ranks.mesh.barrier("measure", _DEADLINE_S)
        self.marks.measuring_s = clock.now_s()
        completions = await self._generate(requests)
        elapsed_s = clock.now_s() - self.marks.measuring_s
        after = await session.gather_reports()
        if before is None or after is None:
            return
        at_once = work.is_fixed and work.num_prompts <= self._num_places
        timing = JobTiming(elapsed_s, tuple(completions), at_once)
        reports = reports_since(before, after)
        record = {
            "work": work.name,
            "mode": "latency" if self.options.latency else "throughput",
            **throughput_record(timing, reports, self._floor(work), self._predicted(work)),
            **environment(session),
            "boot": self.marks.record(after),
            "command": self.options.command,
            "seed": self.options.seed,
        }
        self.view.measured(record)

    async def _generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All completions, on the head; checks that every token asked for was made."""
        async with aclosing(self.session.generate(requests)) as generated:
            completions = [completion async for completion in generated]
        wanted = {request.request_id: request.sampling.max_new_tokens for request in requests}
        for completion in completions:
            made, asked = completion.num_output_tokens, wanted[completion.request_id]
            if completion.error_kind is not None or made != asked:
                raise ConfigError(
                    f"the benchmark's prompt {completion.request_id} came to {made} of {asked} "
                    f"tokens ({completion.error_message or completion.finish_reason.value}): "
                    "choose a shorter work or more KV cache"
                )
        return completions

    def _predicted(self, work: BenchWork) -> Prediction | None:
        return self.session.predicting()(work.lengths(self.options.seed), work.shared_ratio)

    def _floor(self, work: BenchWork) -> FloorTimes | None:
        session, plan = self.session, self.session.plan
        assert self.model is not None, "only the head compares"
        names = {rank_resources.gpu.name for rank_resources in session.resources}
        gpu_name = names.pop() if len(names) == 1 else ""
        ceilings = ceilings_of(plan.device, gpu_name, plan.threads_per_rank)
        if ceilings is None:
            return None
        lengths = sorted(work.lengths(self.options.seed), reverse=True)
        share = lengths[:: plan.num_replicas]  # the largest that one replica gets, if all are fair
        floor = job_floor(self.model.spec, plan, JobShape.of(share, work.shared_ratio), ceilings)
        if plan.num_replicas == 1:
            return floor
        more = sum(output for _, output in lengths) / sum(output for _, output in share)
        decode = floor.decode_tokens_per_s
        return dataclasses.replace(
            floor,
            tokens_per_s=floor.tokens_per_s * more,
            decode_tokens_per_s=None if decode is None else decode * more,
        )

    async def _profile(self, path: Path) -> None:
        """The first work again with fewer tokens, the middle of its decoding profiled."""
        from mpipipe.bench.timeline import profiling, write_profile

        work = self.options.works[0]
        requests = [
            _shortened(request, _PROFILE_OUTPUT_TOKENS)
            for request in self._requests(work, warm_up=False)
        ]
        ranks = self.session.ranks
        async with profiling(ranks, self.session, _PROFILE_STEPS) as profile:
            await self._generate(requests)
        await in_phase(ranks, "profile", lambda: write_profile(profile, path, ranks.mesh.rank))


def _shortened(request: Request, most_tokens: int) -> Request:
    count = min(request.sampling.max_new_tokens, most_tokens)
    return dataclasses.replace(request, sampling=request.sampling.replace(max_new_tokens=count))


def _with_drafts_asked(loaded: LoadedConfig, works: Sequence[BenchWork]) -> LoadedConfig:
    """Random tokens are no text, and what random weights repeat says nothing about drafts.

    So `auto` means drafts only for works that repeat.
    """
    pipeline = loaded.config.pipeline
    if pipeline.num_speculative_tokens != AUTO or any(work.repeats for work in works):
        return loaded
    pipeline = dataclasses.replace(pipeline, num_speculative_tokens=0)
    config = dataclasses.replace(loaded.config, pipeline=pipeline)
    return dataclasses.replace(loaded, config=config)


def _check_lengths(model: ModelFacts, options: ThroughputOptions) -> None:
    """Refuse works that are longer than the model can go."""
    limit = model.loaded.config.memory.max_context_tokens
    longest = model.spec.max_context_tokens if limit == AUTO else int(limit)
    for work in options.works:
        if work.longest_tokens > longest:
            raise ConfigError(
                f"{work.name} makes sequences of {work.longest_tokens} tokens, and {model.folder} "
                f"goes to {longest}: choose shorter ones, or raise memory.max_context_tokens as "
                "far as the model goes"
            )


def _no_text(_: Sequence[int]) -> str:
    return ""
