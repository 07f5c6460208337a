"""`mpipipe run`: a prompt file in, a run folder out. All ranks run this; the head reports.

A run that is told to stop (`runtime.stop_switch`) ends with exit code 75 or 130, its files whole;
with `output.resume` a later one goes on from them (`run_folder.resume`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from mpipipe.config.load import load_config
from mpipipe.config.prompts import configured_prompts
from mpipipe.errors import EXIT_OK, EXIT_PROMPTS, OutputError
from mpipipe.job.acquire import Acquired, acquire
from mpipipe.job.manifest import complete_manifest, record_start
from mpipipe.job.recording import Recording, recording
from mpipipe.job.supervision import RankPage, RankPhase
from mpipipe.metrics.attempts import DONE, STOPPED, AttemptTotals
from mpipipe.metrics.log import open_log
from mpipipe.metrics.summary import PhaseTimes, RequestTally, RequestTotals, RunSummary
from mpipipe.planning.layout import stage_order
from mpipipe.planning.resolve import deepspeed_warnings
from mpipipe.run_folder.accounts import read_accounts
from mpipipe.run_folder.file_thread import FileThread
from mpipipe.run_folder.files import told_as_output, write_json
from mpipipe.run_folder.history import finished_metrics
from mpipipe.run_folder.journal import CompletionWriter, merge
from mpipipe.run_folder.status_file import (
    UPDATE_INTERVAL_S,
    ProgressFile,
    RunState,
    fail_for_lost_head,
)
from mpipipe.runtime.ranks import Ranks, in_phase, share_exit_code
from mpipipe.runtime.requests import Prepared, PreparedPrompts, tokenize
from mpipipe.runtime.shared_folders import check_output_folder
from mpipipe.runtime.shared_stop import watch_for_stop
from mpipipe.runtime.startup import Joined, joined_ranks, loaded_session
from mpipipe.topology.host import host_name
from mpipipe.topology.profilers import profiler_problem
from mpipipe.topology.slurm import launch_warnings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from mpipipe.config.load import LoadedConfig
    from mpipipe.config.prompts import PromptLine
    from mpipipe.job.view import JobView
    from mpipipe.metrics.boot import BootTimeline
    from mpipipe.metrics.identity import RunIdentity
    from mpipipe.metrics.log import RunLog
    from mpipipe.planning.model_facts import ModelFacts
    from mpipipe.runtime.session import Session
    from mpipipe.runtime.stop_switch import StopSwitch
    from mpipipe.types import Completion

__all__ = ["run_job"]

_PROGRESS_INTERVAL_S = 0.25
_EXIT_DEADLINE_S = 120.0
_LAST_WRITES_S = 5.0


@dataclass(slots=True)
class _Marks:
    """When the phases of the run ended, in seconds of the run's clock."""

    started_s: float
    booted_s: float = 0.0
    loaded_s: float = 0.0
    generated_s: float = 0.0

    def phases(self, now_s: float) -> PhaseTimes:
        return PhaseTimes(
            boot_s=self.booted_s - self.started_s,
            load_s=self.loaded_s - self.booted_s,
            generate_s=self.generated_s - self.loaded_s,
            shutdown_s=now_s - self.generated_s,
        )


@dataclass(frozen=True, slots=True)
class _Job:
    """A run that has its folder, and where it reports to."""

    ranks: Ranks
    loaded: LoadedConfig
    acquired: Acquired
    identity: RunIdentity  # of this rank, in every line that it writes
    log: RunLog
    view: JobView
    marks: _Marks
    progress: ProgressFile
    page: RankPage
    first_manifest: dict[str, Any] = field(default_factory=dict)  # of the head
    files: FileThread = field(default_factory=FileThread)  # while the run generates


async def run_job(
    config_path: Path,
    overrides: Sequence[str],
    view: JobView,
    boot: BootTimeline,
    *,
    stop: StopSwitch | None = None,
    page: RankPage,
    examine: Callable[[int], list[dict[str, Any]]] | None = None,
    debug: bool,
) -> int:
    """Complete the configured prompts; returns the exit code, the same on every rank.

    `boot` has what this process did so far. `page` is kept up to date, for this rank's supervisor
    if it has one. `examine` gives the doctor's cheap findings about a node of so many ranks.

    Raises:
        MpipipeError: on every rank, after an orderly end; the job is aborted otherwise.
    """

    def load() -> LoadedConfig:
        loaded = load_config(config_path, overrides)
        page.silence_limit_s = loaded.config.pipeline.heartbeat_timeout_s
        return loaded

    def read(model: ModelFacts) -> list[PromptLine]:
        return configured_prompts(model.loaded)

    joining = joined_ranks(
        boot.clock, load, read, heartbeats=True, stop=stop, boot=boot, debug=debug
    )
    async with joining as joined:
        boot.begin("run folder")
        acquired = await acquire(joined)
        await check_output_folder(joined.ranks, acquired.folder)
        job = _open_job(joined, acquired, view, _Marks(boot.started_s), page)
        warn = partial(_warn, job)
        job.first_manifest.update(await record_start(joined, acquired, examine, warn))
        exit_code = await _do(job, joined)
        job.log.close()
        acquired.close()
        return exit_code


def _open_job(
    joined: Joined[list[PromptLine]],
    acquired: Acquired,
    view: JobView,
    marks: _Marks,
    page: RankPage,
) -> _Job:
    """Open this rank's log in the run folder, and see to it that an early end is told there."""
    ranks, loaded, resources = joined.ranks, joined.loaded, joined.resources
    rank = ranks.mesh.rank
    stage = ranks.vitals.stage = stage_order(resources).index(rank)
    page.opened(acquired.folder, stage)
    identity = acquired.identity(rank, stage)
    log = open_log(
        acquired.folder / f"rank_{rank}.log",
        identity=identity,
        host=host_name(),
        level=loaded.config.log.level,
        on_failure=view.warned,
    )
    view.log_opened(log)
    folder = acquired.folder if ranks.is_head else None
    progress = ProgressFile(folder, [rank_resources.host for rank_resources in resources])

    def end_early(error: BaseException) -> None:
        log.error("ended early", error=str(error), kind=type(error).__name__)
        log.close()
        # The one that has the lock tells the state of the folder.
        progress.failed(error)
        fail_for_lost_head(acquired.folder, error)
        acquired.close()

    ranks.on_failure.append(end_early)
    _log_events(ranks, log)
    log.info(
        "handshake", resources=[dataclasses.asdict(rank_resources) for rank_resources in resources]
    )
    return _Job(ranks, loaded, acquired, identity, log, view, marks, progress, page)


def _log_events(ranks: Ranks, log: RunLog) -> None:
    """Parts of the boot, agreements, and times at which this rank stood still go to the log."""
    ranks.boot.listen(lambda part: log.info("boot", **part.event()))
    ranks.on_phase.append(
        lambda phase, own_s, wait_s: log.debug("agreed", phase=phase, own_s=own_s, wait_s=wait_s)
    )
    ranks.vitals.on_pause = lambda seconds, cpu_s: log.warning(
        "held up", seconds=round(seconds, 3), cpu_s=round(cpu_s, 3)
    )


async def _do(job: _Job, joined: Joined[list[PromptLine]]) -> int:
    """Load and generate; neither when earlier attempts have left nothing to do."""
    ranks, acquired, marks = job.ranks, job.acquired, job.marks
    if ranks.is_head:
        _tell_what_is_left(job)
    if acquired.done_code is not None:
        # The earlier attempt may not have merged what it completed. Not stoppable: all is done, so
        # there is no reason to come back.
        await in_phase(ranks, "merge", lambda: _merge_only(job), stoppable=False)
        job.progress.write(RunState.DONE, exit_code=acquired.done_code)
        return acquired.done_code

    def prepare(model: ModelFacts) -> Prepared:
        job.progress.write(RunState.LOADING)
        lines = acquired.lines_left
        return tokenize(model, lines, tokenizing=lambda: ranks.boot.begin("tokenise"))

    loading = loaded_session(joined, prepare, job.log, acquired.folder)
    async with loading as (session, prepared):
        marks.booted_s, marks.loaded_s = ranks.phase_ended_s["tokenizer"], ranks.clock.now_s()

        def stop() -> None:
            session.stop()
            job.files.post(lambda: _tell_stop(job))

        async with watch_for_stop(ranks, stop), _steps_told(ranks, job.page):
            exit_code = await _run(job, session, prepared.prompts)
        job.files.close()  # not before: a stop may come until here
        return exit_code


def _tell_stop(job: _Job) -> None:
    job.log.warning("stopping", reason=job.ranks.stop.reason)
    job.progress.write(RunState.STOPPING, stop_reason=job.ranks.stop.reason)


def _merge_only(job: _Job) -> None:
    """Leave what a run leaves that has completed everything, without a prompt of its own (head)."""
    if not job.ranks.is_head:
        return
    began_s = job.ranks.clock.now_s()
    finished = finished_metrics(job.acquired.folder)
    _merge(job, {}, metrics_stay=finished is not None)
    now_s, nothing = job.ranks.clock.now_s(), _all_requests(job, RequestTally(), 0)
    marks = dataclasses.replace(job.marks, booted_s=now_s, loaded_s=now_s, generated_s=now_s)
    summary = _summary(
        job, marks.phases(now_s), nothing, num_preemptions=0, ranks=(), io_write_s=now_s - began_s
    )
    _write_metrics(job.acquired.folder, metrics := summary.added_to(finished))
    job.log.info("summary", metrics=metrics)


def _write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """With what Slurm has counted of earlier attempts; of this one it is known after its end."""
    write_json(folder / "metrics.json", {**metrics, "slurm": read_accounts(folder)})


def _merge(job: _Job, written: Mapping[str, int], *, metrics_stay: bool = False) -> None:
    """Merge what earlier attempts have kept and this one has `written`; checksums by prompt id."""
    # Of an earlier attempt: it must not stand beside other completions.
    with told_as_output(metrics := job.acquired.folder / "metrics.json"):
        if not metrics_stay:
            metrics.unlink(missing_ok=True)
    checksums = {**job.acquired.earlier.records.checksums, **written}
    merge(job.acquired.folder, job.acquired.index_of, checksums)


def _warn(job: _Job, message: str) -> None:
    job.log.warning("journal", message=message)
    job.view.warned(message)


@asynccontextmanager
async def _steps_told(ranks: Ranks, page: RankPage) -> AsyncIterator[None]:
    """While inside, the supervisor learns of this rank's steps, a moment late."""

    async def tell() -> None:
        while True:
            page.step = ranks.vitals.step
            await asyncio.sleep(_PROGRESS_INTERVAL_S)

    page.phase = RankPhase.RUNNING
    telling = ranks.tasks.create_task(tell(), name="steps told")
    try:
        yield
    finally:
        telling.cancel()


def _tell_what_is_left(job: _Job) -> None:
    acquired, kept, folder = job.acquired, job.acquired.earlier.records, job.acquired.folder
    num_left, num_kept = len(acquired.lines_left), len(kept.checksums)
    if acquired.is_resumed:
        job.log.info("resumed", num_kept=num_kept, num_left=num_left, num_damaged=kept.num_damaged)
        job.view.resumed(num_kept, num_left, folder)
    if kept.num_damaged:
        _warn(
            job,
            f"{kept.num_damaged:,} lines of completions_rank_*.jsonl were damaged, of no prompt of "
            "this run, or others of a prompt that has a record: they are in damaged_rank_*.jsonl "
            f"in {folder} now, and prompts without a record run again",
        )
    num_prompts = len(acquired.index_of)
    job.progress.write(RunState.BOOTING, num_prompts=num_prompts, num_kept=num_kept)


def _tell_plan(job: _Job, session: Session, prompts: PreparedPrompts, problem: str | None) -> None:
    """The plan, and what the user should know of; `problem`: of the profiler, in each log."""
    warnings = [
        *job.loaded.warnings,
        *deepspeed_warnings(job.loaded, session.plan),
        *prompts.warnings,
        *launch_warnings(os.environ, session.ranks.mesh.world_size),
    ]
    for warning in warnings:
        job.log.warning("configuration", message=warning)
    job.view.planned(session.plan, [*warnings, problem] if problem else warnings)


async def _run(job: _Job, session: Session, prompts: PreparedPrompts) -> int:
    loaded, folder = job.loaded, job.acquired.folder
    problem = profiler_problem(loaded.config.profile.tool, os.environ, host_name())
    if problem:
        job.log.warning("profile", message=problem)
    if not session.is_head:
        async with _recording(job, session):
            await session.serve_until_ended()
        await session.gather_reports()
        job.log.info("ended")
        return await share_exit_code(job.ranks, EXIT_OK, _EXIT_DEADLINE_S)
    _tell_plan(job, session, prompts, problem)
    manifest = complete_manifest(job.first_manifest, session, loaded, job.acquired)
    await job.files.run(lambda: write_json(folder / "manifest.json", manifest))
    async with _recording(job, session) as recorded:
        tally = await _complete(job, session, prompts, manifest)
    session.end()
    reports = await session.gather_reports()
    assert reports is not None, "the head gathers"
    statistics = session.statistics()
    summary = _summary(
        job,
        job.marks.phases(session.ranks.clock.now_s()),
        _all_requests(job, tally, prompts.num_prompts),
        num_preemptions=statistics.num_preemptions if statistics is not None else 0,
        ranks=reports,
        itl_p50_s=recorded.gaps.percentile(50),
        itl_p95_s=recorded.gaps.percentile(95),
        io_write_s=job.files.busy_s,
    )
    return await share_exit_code(job.ranks, await _report(job, summary), _EXIT_DEADLINE_S)


def _all_requests(job: _Job, tally: RequestTally, num_prompts: int) -> RequestTotals:
    totals, earlier = tally.totals(), job.acquired.earlier
    return dataclasses.replace(
        totals,
        num_unfinished=num_prompts - totals.num_completed - totals.num_failed,
        num_kept=len(earlier.kept_ids),
        num_damaged=earlier.records.num_damaged,
    )


def _summary(job: _Job, phases: PhaseTimes, requests: RequestTotals, **figures: Any) -> RunSummary:
    """What this attempt did, beside what the earlier ones have."""
    told = map(AttemptTotals.from_plain, job.acquired.earlier.attempts)
    return RunSummary(
        phases=phases,
        requests=requests,
        identity=job.identity,
        state=STOPPED if requests.num_unfinished else DONE,
        earlier=tuple(attempt for attempt in told if attempt is not None),
        **figures,
    )


def _recording(job: _Job, session: Session) -> AbstractAsyncContextManager[Recording]:
    wanted, folder = job.loaded.config.log, job.acquired.folder
    return recording(
        folder, job.identity, wanted, session, job.files, on_failure=lambda told: _warn(job, told)
    )


async def _report(job: _Job, summary: RunSummary) -> int:
    """Write and show how the run ended; returns the exit code."""
    reason, requests = job.ranks.stop.reason, summary.requests
    await job.files.run(lambda: _write_metrics(job.acquired.folder, summary.to_dict()))
    job.log.info("summary", metrics=summary.to_dict())
    job.view.finished(summary, job.acquired.folder)
    num_failed = requests.num_failed + job.acquired.earlier.records.num_failed
    exit_code = EXIT_PROMPTS if num_failed else EXIT_OK
    if requests.num_unfinished:
        exit_code = job.ranks.stop.exit_code
        job.view.stopped(reason, requests.num_unfinished, job.acquired.folder)
    state = RunState.STOPPED if requests.num_unfinished else RunState.DONE
    end = {"exit_code": exit_code, "num_unfinished": requests.num_unfinished}
    await job.files.run(lambda: job.progress.write(state, **end))
    return exit_code


async def _complete(
    job: _Job, session: Session, prompts: PreparedPrompts, manifest: dict[str, Any]
) -> RequestTally:
    """Generate, write each completion as it ends, merge them in input order."""
    folder, view = job.acquired.folder, job.view
    tally = RequestTally()
    view.generating(prompts.num_prompts, job.loaded.config.log.progress)

    def warn(message: str) -> None:
        _warn(job, message)
        if not (folder / "manifest.json").exists():  # the whole folder was moved or removed
            write_json(folder / "manifest.json", manifest)

    async with _journal(job, CompletionWriter(folder, session.ranks.mesh.rank, warn)) as writer:

        def take(completion: Completion) -> None:
            job.files.post(lambda: _keep(job, writer, completion))
            tally.add(completion)
            view.completed(completion)

        for completion in prompts.rejected:
            take(completion)
        # Opening the journal, bringing it to the disk and merging are no part of generating: all
        # ranks account for their time from here to the end of the loop.
        job.marks.loaded_s = session.ranks.clock.now_s()
        showing = session.ranks.tasks.create_task(_show(job, session, tally), name="progress view")
        try:
            async with aclosing(session.generate(prompts.requests)) as completions:
                async for completion in completions:
                    take(completion)
        finally:
            job.marks.generated_s = session.ranks.clock.now_s()
            showing.cancel()
            view.ended()
            _tell(job, session, tally)
    # It takes long for many completions; a rank that is told to stop meanwhile asks this one.
    await job.files.run(lambda: _merge(job, writer.written))
    return tally


@asynccontextmanager
async def _journal(job: _Job, writer: CompletionWriter) -> AsyncIterator[CompletionWriter]:
    """`writer`, open; at the end all that was posted to it is on the disk."""
    await job.files.run(writer.__enter__)
    try:
        yield writer
    except BaseException:
        # The run has failed: a file system that does not answer must not keep it from ending.
        with suppress(TimeoutError, OutputError):
            async with asyncio.timeout(_LAST_WRITES_S):
                await job.files.run(writer.__exit__)
        raise
    await job.files.run(writer.__exit__)


def _keep(job: _Job, writer: CompletionWriter, completion: Completion) -> None:
    writer.write(completion)
    job.log.info(
        "completed",
        request=completion.request_id,
        finish_reason=completion.finish_reason.value,
        num_prompt_tokens=completion.num_prompt_tokens,
        num_output_tokens=completion.num_output_tokens,
        latency_s=round(completion.latency_s, 6),
        error=completion.error_kind,
    )


async def _show(job: _Job, session: Session, tally: RequestTally) -> None:
    """Keep the progress display and the status file alive until cancelled."""
    clock = session.ranks.clock
    told_s = float("-inf")
    while True:
        statistics = session.statistics()
        running = statistics.num_running if statistics is not None else 0
        job.view.progress(tally.num_completed, tally.num_failed, session.num_output_tokens, running)
        if clock.now_s() - told_s >= UPDATE_INTERVAL_S:
            told_s = clock.now_s()
            _tell(job, session, tally)
        await asyncio.sleep(_PROGRESS_INTERVAL_S)


def _tell(job: _Job, session: Session, tally: RequestTally) -> None:
    """The counts of this moment, into `status.json`."""
    statistics = session.statistics()
    elapsed_s = session.ranks.clock.now_s() - job.marks.loaded_s
    state = RunState.STOPPING if session.ranks.stop.reason else RunState.GENERATING
    left_s = session.ranks.stop.seconds_left
    values = {
        "num_completed": tally.num_completed,
        "num_failed": tally.num_failed,
        "num_running": statistics.num_running if statistics is not None else 0,
        "num_output_tokens": session.num_output_tokens,
        "tokens_per_s": round(session.num_output_tokens / elapsed_s, 1) if elapsed_s > 0 else 0.0,
        "generating_s": round(elapsed_s, 1),
        "stops_in_s": None if left_s is None else round(left_s),
    }
    with suppress(OutputError):  # of an earlier write: the next completion tells it
        job.files.post(lambda: job.progress.write(state, **values))
