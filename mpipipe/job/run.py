"""`mpipipe run`: a prompt file in, a run folder out. All ranks run this; the head reports.

A run that is told to stop (`runtime.stop_switch`) ends with exit code 75 or 130, its files whole;
with `output.resume` a later one goes on from them (`run_folder.resume`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from mpipipe.config.load import load_config
from mpipipe.config.prompts import configured_prompts
from mpipipe.errors import EXIT_OK
from mpipipe.job.acquire import Acquired, acquire
from mpipipe.job.ending import all_requests, end_early, merge_only, report, summarize
from mpipipe.job.generating import PROGRESS_INTERVAL_S, complete
from mpipipe.job.job import Job, Marks
from mpipipe.job.manifest import complete_manifest, record_start
from mpipipe.job.recording import Recording, recording
from mpipipe.job.supervision import RankPage, RankPhase
from mpipipe.metrics.log import open_log
from mpipipe.models.chat import start_early
from mpipipe.planning.resolve import deepspeed_warnings
from mpipipe.run_folder.files import write_json
from mpipipe.run_folder.status_file import (
    ProgressFile,
    RunState,
)
from mpipipe.runtime.ranks import Ranks, in_phase, share_exit_code
from mpipipe.runtime.requests import (
    Prepared,
    PreparedPrompts,
    expected_workload,
    tokenize,
)
from mpipipe.runtime.shared_folders import check_output_folder
from mpipipe.runtime.shared_stop import watch_for_stop
from mpipipe.runtime.startup import Joined, joined_ranks, loaded_session
from mpipipe.topology.host import host_name
from mpipipe.topology.profilers import profiler_problem
from mpipipe.topology.slurm import launch_warnings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from mpipipe.config.load import LoadedConfig
    from mpipipe.config.prompts import PromptLine
    from mpipipe.job.view import JobView
    from mpipipe.metrics.boot import BootTimeline
    from mpipipe.metrics.log import RunLog
    from mpipipe.planning.model_facts import ModelFacts
    from mpipipe.runtime.session import Session
    from mpipipe.runtime.stop_switch import StopSwitch

__all__ = ["run_job"]

_EXIT_DEADLINE_S = 120.0


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

    joining = joined_ranks(
        boot.clock,
        load,
        _read_prompts,
        expect=expected_workload,
        heartbeats=True,
        stop=stop,
        boot=boot,
        debug=debug,
    )
    async with joining as joined:
        boot.begin("run folder")
        acquired = await acquire(joined)
        await check_output_folder(joined.ranks, acquired.folder)
        job = _open_job(joined, acquired, view, Marks(boot.started_s), page)
        job.first_manifest.update(await record_start(joined, acquired, examine, job.warn))
        exit_code = await _do(job, joined)
        job.log.close()
        acquired.close()
        return exit_code


def _read_prompts(model: ModelFacts) -> list[PromptLine]:
    """The configured ones; what renders conversations starts, if there are some."""
    lines = configured_prompts(model.loaded)
    if any(line.messages is not None for line in lines):
        start_early()
    return lines


def _open_job(
    joined: Joined[list[PromptLine]],
    acquired: Acquired,
    view: JobView,
    marks: Marks,
    page: RankPage,
) -> Job:
    """Open this rank's log in the run folder, and see to it that an early end is told there."""
    ranks, loaded, resources = joined.ranks, joined.loaded, joined.resources
    rank = ranks.mesh.rank
    place = joined.layout.place_of(rank)
    ranks.vitals.stage = place.stage
    page.opened(acquired.folder, place.stage)
    identity = acquired.identity(rank, place)
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

    job = Job(ranks, loaded, acquired, identity, log, view, marks, progress, page)
    ranks.on_failure.append(partial(end_early, job))
    _log_events(ranks, log)
    log.info(
        "handshake", resources=[dataclasses.asdict(rank_resources) for rank_resources in resources]
    )
    return job


def _log_events(ranks: Ranks, log: RunLog) -> None:
    """Parts of the boot, agreements, and times at which this rank stood still go to the log."""
    ranks.boot.listen(lambda part: log.info("boot", **part.event()))
    ranks.on_phase.append(
        lambda phase, own_s, wait_s: log.debug("agreed", phase=phase, own_s=own_s, wait_s=wait_s)
    )
    ranks.vitals.on_pause = lambda seconds, cpu_s: log.warning(
        "held up", seconds=round(seconds, 3), cpu_s=round(cpu_s, 3)
    )


async def _do(job: Job, joined: Joined[list[PromptLine]]) -> int:
    """Load and generate; neither when earlier attempts have left nothing to do."""
    ranks, acquired, marks = job.ranks, job.acquired, job.marks
    if ranks.is_head:
        _tell_what_is_left(job)
    if acquired.done_code is not None:
        # The earlier attempt may not have merged what it completed. Not stoppable: all is done, so
        # there is no reason to come back.
        await in_phase(ranks, "merge", lambda: merge_only(job), stoppable=False)
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


def _tell_stop(job: Job) -> None:
    job.log.warning("stopping", reason=job.ranks.stop.reason)
    job.progress.write(RunState.STOPPING, stop_reason=job.ranks.stop.reason)


@asynccontextmanager
async def _steps_told(ranks: Ranks, page: RankPage) -> AsyncIterator[None]:
    """While inside, the supervisor learns of this rank's steps, a moment late."""

    async def tell() -> None:
        while True:
            page.step = ranks.vitals.step
            await asyncio.sleep(PROGRESS_INTERVAL_S)

    page.phase = RankPhase.RUNNING
    telling = ranks.tasks.create_task(tell(), name="steps told")
    try:
        yield
    finally:
        telling.cancel()


def _tell_what_is_left(job: Job) -> None:
    acquired, kept, folder = job.acquired, job.acquired.earlier.records, job.acquired.folder
    num_left, num_kept = len(acquired.lines_left), len(kept.checksums)
    if acquired.is_resumed:
        job.log.info("resumed", num_kept=num_kept, num_left=num_left, num_damaged=kept.num_damaged)
        job.view.resumed(num_kept, num_left, folder)
    if kept.num_damaged:
        job.warn(
            f"{kept.num_damaged:,} lines of completions_rank_*.jsonl were damaged, of no prompt of "
            "this run, or others of a prompt that has a record: they are in damaged_rank_*.jsonl "
            f"in {folder} now, and prompts without a record run again",
        )
    num_prompts = len(acquired.index_of)
    job.progress.write(RunState.BOOTING, num_prompts=num_prompts, num_kept=num_kept)


def _tell_plan(job: Job, session: Session, prompts: PreparedPrompts, problem: str | None) -> None:
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


async def _run(job: Job, session: Session, prompts: PreparedPrompts) -> int:
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
    predicting = session.predicting()
    lengths = prompts.lengths(session.plan.max_context_tokens)
    planned = predicting(lengths, session.expected_shared_ratio)
    manifest = complete_manifest(job.first_manifest, session, loaded, job.acquired)
    await job.files.run(lambda: write_json(folder / "manifest.json", manifest))
    async with _recording(job, session) as recorded:
        tally = await complete(job, session, prompts, manifest)
    session.end()
    reports = await session.gather_reports()
    assert reports is not None, "the head gathers"
    requests = all_requests(job, tally, prompts.num_prompts)
    shared_ratio = tally.shared_ratio(session.num_shared_tokens)
    summary = summarize(
        job,
        job.marks.phases(session.ranks.clock.now_s()),
        requests,
        num_preemptions=session.num_preemptions,
        drafts=session.drafts,
        num_shared_tokens=session.num_shared_tokens,
        ranks=reports,
        replicas=session.replica_totals(),
        itl_p50_s=recorded.gaps.percentile(50),
        itl_p95_s=recorded.gaps.percentile(95),
        io_write_s=job.files.busy_s,
        planned=planned,
        predicted=None if requests.num_unfinished else predicting(tally.lengths, shared_ratio),
    )
    return await share_exit_code(job.ranks, await report(job, summary), _EXIT_DEADLINE_S)


def _recording(job: Job, session: Session) -> AbstractAsyncContextManager[Recording]:
    wanted, folder = job.loaded.config.log, job.acquired.folder
    return recording(folder, job.identity, wanted, session, log=job.log.file, on_failure=job.warn)
