"""A live pipeline on this rank: generate as often as wanted, then report and leave together."""

from __future__ import annotations

from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from mpipipe.control_plane.group import RankGroup
from mpipipe.control_plane.messages import (
    DispatchBegan,
    DispatchEnded,
    GenerationBegan,
    GenerationEnded,
    SessionEnded,
)
from mpipipe.metrics.lines import RequestRecord
from mpipipe.metrics.summary import RankReport
from mpipipe.plain_values import from_json, to_json
from mpipipe.planning.compiled_kernels import are_kernels_compiled
from mpipipe.planning.known_times import known_times
from mpipipe.planning.predict import predict
from mpipipe.scheduler.core import SchedulerCore
from mpipipe.scheduler.detokenize import SpecialTokens
from mpipipe.scheduler.instructions import SchedulerStatistics
from mpipipe.scheduler.replicas import Dispatch, ReplicaLink, ReplicaPlace
from mpipipe.scheduler.runner import Runner
from mpipipe.scheduler.texts import TextMaker
from mpipipe.topology.host import host_name, peak_rss_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
    from pathlib import Path

    from mpipipe.config.load import LoadedConfig
    from mpipipe.metrics.accounting import StageAccount, StepRecord
    from mpipipe.metrics.drafts import DraftUse
    from mpipipe.metrics.log import Logger
    from mpipipe.metrics.offload import OffloadUse
    from mpipipe.metrics.predicted import Prediction
    from mpipipe.metrics.replicas import ReplicaTotals
    from mpipipe.models.tokenizer_base import Tokenizer
    from mpipipe.planning.layout import Layout
    from mpipipe.planning.model_facts import ModelFacts
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.planning.resources import RankResources
    from mpipipe.runtime.clock_offsets import ClockOffset, Clocks
    from mpipipe.runtime.kernels_ahead import KernelProcess
    from mpipipe.runtime.ranks import Ranks
    from mpipipe.runtime.requests import Prepared
    from mpipipe.stage.worker import StageWorker
    from mpipipe.types import Completion, Request

__all__ = ["Boot", "LoadFacts", "Session"]

_GATHER_DEADLINE_S = 120.0
_NOTHING_YET = SchedulerStatistics()


@dataclass(frozen=True, slots=True)
class Boot:
    """What a session starts from."""

    ranks: Ranks
    loaded: LoadedConfig
    resources: tuple[RankResources, ...]
    layout: Layout
    model: ModelFacts | None  # on the heads of replicas
    prepared: Prepared  # on these; all of it on rank 0
    log: Logger
    folder: Path  # for what a profiler records
    kernels: KernelProcess | None = None  # compiles what this host's stages launch

    @property
    def hosts(self) -> list[str]:
        """By rank."""
        return [rank_resources.host for rank_resources in self.resources]


@dataclass(frozen=True, slots=True)
class LoadFacts:
    """What loading this rank's stage took and left."""

    load_s: float  # of this rank's own work; without waiting for others
    loaded_bytes: int
    weight_bytes: int
    kv_bytes: int
    kv_host_bytes: int
    baseline_rss_bytes: int
    capture_s: float | None = None  # trial steps and CUDA graphs, a part of load_s; None: no graphs


class Session:
    """One rank's end of a loaded pipeline, or of several replicas; made by `boot.open_session`."""

    def __init__(
        self,
        boot: Boot,
        *,
        plan: PipelinePlan,
        plans: Sequence[PipelinePlan] = (),
        worker: StageWorker,
        account: StageAccount,
        clocks: Clocks,
        load: LoadFacts,
    ) -> None:
        self.ranks = boot.ranks
        self.resources = boot.resources
        self.plan = plan
        self.plans = tuple(plans) or (plan,)  # of all replicas
        self.clocks = clocks
        self.load = load
        self._model = boot.model
        self._tokenizer = tokenizer = boot.prepared.tokenizer
        self._decode = boot.prepared.decode
        self.expected_shared_ratio = boot.prepared.workload.shared_ratio  # as `Workload` has it
        self._kernels = boot.kernels
        self._special = SpecialTokens(tokenizer.special_tokens if tokenizer else {})
        self._log = boot.log
        self._worker = worker
        self._account = account
        self._group = RankGroup(boot.ranks.mesh, plan.ranks)
        self._on_request: Callable[[RequestRecord, int], None] | None = None
        self.energy_j: float | None = None  # of this rank's device, once it is known
        self.io_write_s = 0.0  # of the thread that writes this rank's lines
        self._core: SchedulerCore | None = None
        self._runner: Runner | None = None
        self._dispatch: Dispatch | None = None
        self._stopped = False
        if self._is_fed:  # takes `SessionEnded` over from the worker
            self._from_rank_0 = self._group.mailbox(DispatchBegan, DispatchEnded, SessionEnded)

    @property
    def is_head(self) -> bool:
        """Whether this rank yields completions: rank 0, which hands requests to all replicas."""
        return self.ranks.is_head

    @property
    def _is_fed(self) -> bool:
        """Whether this rank, a head of several, schedules what rank 0 hands out."""
        return len(self.plans) > 1 and self.ranks.mesh.rank == self.plan.head_rank

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; on the heads of replicas only."""
        assert self._tokenizer is not None, "only a head has the tokenizer"
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding: a token id must be below; on the heads only."""
        assert self._model is not None, "only a head knows the model"
        return self._model.spec.vocab_size

    def predicting(self) -> Callable[[Sequence[tuple[int, int]], float], Prediction | None]:
        """Predicts what requests of given (prompt, output) tokens take here; on heads only.

        Behind them the part of the prompt tokens that is not computed, as others begin alike.
        """
        assert self._model is not None, "only a head knows the model"
        spec = self._model.spec
        known = [known_times(spec, plan, self.resources) for plan in self.plans]
        return partial(predict, spec, self.plans, known, is_compiled=self._found_compiled())

    def _found_compiled(self) -> bool:
        """Whether the kernels were compiled before this start; by now they are in any case.

        Without the process that compiles them (a rank bound to one core has none) no note came of
        this start.
        """
        if self._kernels is not None:
            return self._kernels.found_compiled
        return all(are_kernels_compiled(plan, self.resources) for plan in self.plans)

    def statistics(self) -> SchedulerStatistics | None:
        """The counts of this replica's scheduler; None before the first `generate` and where there
        is none.
        """
        return self._core.statistics() if self._core is not None else None

    # Of the latest `generate` so far: on rank 0 of all replicas, on another head of its own one.

    @property
    def _counts(self) -> Dispatch | SchedulerStatistics:
        if self._dispatch is not None:
            return self._dispatch
        return self.statistics() or _NOTHING_YET

    @property
    def num_output_tokens(self) -> int:
        """Tokens made."""
        if self._dispatch is not None:
            return self._dispatch.num_output_tokens
        return self._runner.num_output_tokens if self._runner is not None else 0

    @property
    def num_running(self) -> int:
        """Sequences in slots."""
        return self._counts.num_running

    @property
    def num_waiting(self) -> int:
        """Requests without a place."""
        return self._counts.num_waiting

    @property
    def num_preemptions(self) -> int:
        """Sequences that lost their pages."""
        return self._counts.num_preemptions

    @property
    def num_saved(self) -> int:
        """Of the preemptions, those whose pages went to host memory."""
        return self._counts.num_saved

    @property
    def drafts(self) -> DraftUse:
        """Tokens drafted by n-gram lookup, and what came of it."""
        return self._counts.drafts

    @property
    def num_shared_tokens(self) -> int:
        """Of prompts, those that were not computed: they were in pages of others."""
        return self._counts.num_shared_tokens

    def replica_totals(self) -> tuple[ReplicaTotals, ...]:
        """What each replica did in the latest `generate` (rank 0); empty where there is one."""
        return () if self._dispatch is None else self._dispatch.totals()

    async def generate(
        self, requests: Iterable[Request], rejected: Iterable[Completion] = ()
    ) -> AsyncGenerator[Completion, None]:
        """Complete `requests`: completions as they end on rank 0, nothing on other ranks.

        `rejected`, prompts that are no requests, come first.

        Every rank must call it the same number of times, one call after the other; other ranks
        serve until rank 0 is done.
        """
        if not self.is_head:
            await self._serve_call()
            return
        run = self._generate_alone if len(self.plans) == 1 else self._generate_on_replicas
        async with aclosing(run(requests, rejected)) as completions:
            async for completion in completions:
                yield completion

    async def _generate_alone(
        self, requests: Iterable[Request], rejected: Iterable[Completion]
    ) -> AsyncGenerator[Completion, None]:
        runner = self._open_runner(self._tell_request)
        if self._stopped:
            runner.stop()
        async with self._stages(runner), aclosing(runner.generate(requests)) as completions:
            for completion in rejected:
                runner.record(completion)
                yield completion
            async for completion in completions:
                yield completion

    async def _generate_on_replicas(
        self, requests: Iterable[Request], rejected: Iterable[Completion]
    ) -> AsyncGenerator[Completion, None]:
        dispatch = self._dispatch = Dispatch(
            self.ranks.mesh,
            self.ranks.clock,
            requests,
            [ReplicaPlace(plan.head_rank, plan.capacity) for plan in self.plans],
            page_size=self.plan.shared_page_size,
            ahead_s=self.clocks.ahead_s,
            on_request=self._tell_request,
        )
        if self._stopped:
            dispatch.stop()
        own = self.ranks.tasks.create_task(self._serve_call(), name="replica")
        # As with a stage that fails: see `_stages`.
        own.add_done_callback(lambda _: dispatch.replica_ended())
        dispatch.begin()
        try:
            for completion in rejected:
                self._tell_request(RequestRecord.refused(completion, self.ranks.clock.now_s()))
                yield completion
            async with aclosing(dispatch.completions()) as completions:
                async for completion in completions:
                    yield completion
        finally:
            await dispatch.end()
            await own

    def stop(self) -> None:
        """End `generate` early, now and later; steps in flight still count (rank 0)."""
        self._stopped = True
        if self._dispatch is not None:
            self._dispatch.stop()
        elif self._runner is not None:
            self._runner.stop()

    def end(self) -> None:
        """Tell the other ranks that no `generate` will follow (rank 0)."""
        self.ranks.mesh.broadcast_message(SessionEnded())

    async def serve_until_ended(self) -> None:
        """Serve `generate` calls until rank 0 ends the session (other ranks)."""
        while await self._serve_call():
            pass

    async def _serve_call(self) -> bool:
        """This rank's part of one `generate`; False: rank 0 has ended the session instead."""
        if not self._is_fed:
            return await self._serve_stage()
        _, message = await self._from_rank_0.get()
        if isinstance(message, SessionEnded):
            return False
        assert isinstance(message, DispatchBegan), message
        link = ReplicaLink(self._group, self.ranks.clock, capacity=self.plan.capacity)
        runner = self._open_runner(link.ended, link)
        async with self._stages(runner):
            async for _ in runner.generate(()):
                pass
            # The stages go on accounting for their time as long as another replica works.
            _, message = await self._from_rank_0.get()
            assert isinstance(message, DispatchEnded), message
        return True

    def _open_runner(
        self, on_request: Callable[[RequestRecord], None], link: ReplicaLink | None = None
    ) -> Runner:
        self._core = self._make_core()
        self._runner = Runner(
            core=self._core,
            group=self._group,
            texts=self._text_maker(),
            clock=self.ranks.clock,
            log=self._log,
            on_request=on_request,
            link=link,
        )
        return self._runner

    def _text_maker(self) -> TextMaker:
        if self._decode is not None:
            return TextMaker(self._decode, special=self._special)
        tokenizer = self.tokenizer
        decode_all = tokenizer.decode_all if tokenizer.decodes_beside else None
        return TextMaker(tokenizer.decode, special=self._special, decode_all=decode_all)

    def _tell_request(self, record: RequestRecord, replica: int = 0) -> None:
        if self._on_request is not None:
            self._on_request(record, replica)

    @asynccontextmanager
    async def _stages(self, runner: Runner) -> AsyncIterator[None]:
        """While inside, the stages of this head's pipeline serve `runner`."""
        self._group.broadcast_message(GenerationBegan())
        served = self.ranks.tasks.create_task(self._serve_stage(), name="stage")
        # A stage that fails takes its error to the task group, which cancels us; no task may
        # then wait for steps that will not come back.
        served.add_done_callback(lambda _: runner.stage_ended())
        try:
            yield
        finally:
            # Also when the caller stops early: what is in flight must come back first, or the
            # stages would be left in the middle of a step.
            await runner.drain()
            self._group.broadcast_message(GenerationEnded())
            await served

    async def _serve_stage(self) -> bool:
        """This stage's part of one `generate`, whose begin and end its log tells."""
        was_called = await self._worker.serve(lambda: self._log.info("generating"))
        if was_called:
            self._log.info("generated")
        return was_called

    def observe(
        self,
        *,
        on_step: Callable[[StepRecord, float | None], None] | None,
        on_request: Callable[[RequestRecord, int], None] | None,
        on_clocks: Callable[[Sequence[ClockOffset]], None] | None,
    ) -> None:
        """From the next `generate` on, tell of each step of this rank with its transfer, of each
        request with its replica, and of each comparison of the clocks (rank 0); of the latest one
        at once.
        """
        self._account.on_step = on_step
        self._on_request = on_request
        self.clocks.on_compared = on_clocks
        if on_clocks is not None:
            on_clocks(self.clocks.offsets)

    async def settle(self) -> None:
        """After `generate`: wait a moment until all that is to be known of its steps is told."""
        await self._worker.settle()

    def give_up_times(self) -> None:
        """Tell of the steps of which not all is known yet; no more will be."""
        self._account.give_up(float("inf"))

    @property
    def num_steps(self) -> int:
        """Steps that have left this rank's stage."""
        return self._account.num_steps

    @property
    def gpu_uuid(self) -> str:
        """Of this rank's GPU; empty on a CPU."""
        return self.resources[self.ranks.mesh.rank].gpu.uuid if self.plan.device == "cuda" else ""

    def recent_steps(self) -> tuple[StepRecord, ...]:
        """The records of this rank's last steps, oldest first."""
        return self._account.recent()

    async def gather_reports(self) -> tuple[RankReport, ...] | None:
        """Every rank's totals, by replica, stage and lane, on rank 0; None elsewhere."""
        await self.settle()
        payload = to_json(self._report()).encode()
        parts = await self.ranks.mesh.gather("report", payload, _GATHER_DEADLINE_S)
        if parts is None:
            return None
        reports = [from_json(RankReport, part) for part in parts]
        return tuple(sorted(reports, key=lambda told: (told.replica, told.stage.stage, told.rank)))

    def _head_us_per_step(self) -> float | None:
        return self._runner.us_per_step if self._runner is not None else None

    def _report(self) -> RankReport:
        used = self._worker.device_use()
        return RankReport(
            rank=self.ranks.mesh.rank,
            host=host_name(),
            replica=self.plan.replica,
            stage=self._account.snapshot(),
            load_s=self.load.load_s,
            boot=self.ranks.boot.parts,
            loaded_bytes=self.load.loaded_bytes,
            weight_bytes=self.load.weight_bytes,
            kv_bytes=self.load.kv_bytes,
            kv_host_bytes=self.load.kv_host_bytes,
            baseline_rss_bytes=self.load.baseline_rss_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            capture_s=self.load.capture_s,
            gpu_peak_bytes=used.gpu_peak_bytes,
            cpu_us_per_step=used.cpu_us_per_step,
            head_us_per_step=self._head_us_per_step(),
            energy_j=self.energy_j,
            io_write_s=self.io_write_s,
            offload=self._offload_use(used.offload),
            page_moves=used.page_moves,
        )

    def _offload_use(self, use: OffloadUse | None) -> OffloadUse | None:
        """What was measured, beside the rates that the plan reckoned with."""
        offload = self.plan.stage_of_rank(self.ranks.mesh.rank).offload
        if use is None or offload is None:
            return use
        return replace(
            use,
            planned_host_bytes_per_s=offload.forecast.host_bytes_per_s,
            planned_disk_bytes_per_s=offload.forecast.disk_bytes_per_s,
        )

    def _make_core(self) -> SchedulerCore:
        return SchedulerCore.of_plan(self.plan, self._eos_token_ids())

    def _eos_token_ids(self) -> tuple[int, ...]:
        assert self._model is not None, "only a head schedules"
        ids = self._model.spec.eos_token_ids
        return ids if ids or self._tokenizer is None else self._tokenizer.eos_token_ids
