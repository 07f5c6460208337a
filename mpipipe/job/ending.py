"""How a run ends: its completions are merged, its figures written, its state told."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mpipipe.errors import EXIT_OK, EXIT_PROMPTS, OutputError, is_stop
from mpipipe.metrics.accounting import StageTotals
from mpipipe.metrics.attempts import DONE, STOPPED, AttemptTotals
from mpipipe.metrics.summary import PhaseTimes, RankReport, RequestTally, RequestTotals, RunSummary
from mpipipe.run_folder.accounts import read_accounts
from mpipipe.run_folder.files import told_as_output, write_json
from mpipipe.run_folder.history import finished_metrics, generated_metrics
from mpipipe.run_folder.journal import merge
from mpipipe.run_folder.status_file import RunState, fail_for_lost_head
from mpipipe.topology.host import host_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mpipipe.job.job import Job

__all__ = ["all_requests", "end_early", "merge_completions", "merge_only", "report", "summarize"]


def merge_only(job: Job) -> None:
    """Leave what a run leaves that has completed everything, without a prompt of its own (head)."""
    if not job.ranks.is_head:
        return
    began_s = job.ranks.clock.now_s()
    finished = finished_metrics(job.acquired.folder)
    merge_completions(job, {}, metrics_stay=finished is not None)
    now_s, nothing = job.ranks.clock.now_s(), all_requests(job, RequestTally(), 0)
    marks = dataclasses.replace(job.marks, booted_s=now_s, loaded_s=now_s, generated_s=now_s)
    summary = summarize(
        job, marks.phases(now_s), nothing, num_preemptions=0, ranks=(), io_write_s=now_s - began_s
    )
    _write_metrics(job.acquired.folder, metrics := summary.added_to(finished))
    job.log.info("summary", metrics=metrics)


def _write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """With what Slurm has counted of earlier attempts; of this one it is known after its end."""
    write_json(folder / "metrics.json", {**metrics, "slurm": read_accounts(folder)})


def merge_completions(job: Job, written: Mapping[str, int], *, metrics_stay: bool = False) -> None:
    """Merge what earlier attempts have kept and this one has `written`; checksums by prompt id."""
    # Of an earlier attempt: it must not stand beside other completions.
    with told_as_output(metrics := job.acquired.folder / "metrics.json"):
        if not metrics_stay:
            metrics.unlink(missing_ok=True)
    checksums = {**job.acquired.earlier.records.checksums, **written}
    merge(job.acquired.folder, job.acquired.index_of, checksums)


def all_requests(job: Job, tally: RequestTally, num_prompts: int) -> RequestTotals:
    """Of this attempt's `num_prompts` those in `tally`, beside what earlier attempts have kept."""
    totals, earlier = tally.totals(), job.acquired.earlier
    return dataclasses.replace(
        totals,
        num_unfinished=num_prompts - totals.num_completed - totals.num_failed,
        num_kept=len(earlier.kept_ids),
        num_damaged=earlier.records.num_damaged,
    )


def summarize(job: Job, phases: PhaseTimes, requests: RequestTotals, **figures: Any) -> RunSummary:
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


def end_early(job: Job, error: BaseException) -> None:
    """Leave what is known when `error` has ended the ranks before the end of the run."""
    job.ranks.boot.end()  # the log tells what was under way
    if job.ranks.is_head and is_stop(error) and not job.marks.loaded_s:
        with suppress(OutputError):  # the run ends in any case, and tells why
            _write_stopped(job)
    job.log.error("ended early", error=str(error), kind=type(error).__name__)
    job.log.close()
    # The one that has the lock tells the state of the folder.
    job.progress.failed(error)
    fail_for_lost_head(job.acquired.folder, error)
    job.acquired.close()


def _write_stopped(job: Job) -> None:
    """The figures of a run that was told to stop before it generated: its boot, as the head had it.

    Those of an earlier attempt that has generated stay.
    """
    ranks, now_s = job.ranks, job.ranks.clock.now_s()
    booted_s = ranks.phase_ended_s.get("tokenizer", now_s)
    marks = dataclasses.replace(job.marks, booted_s=booted_s, loaded_s=now_s, generated_s=now_s)
    unfinished = all_requests(job, RequestTally(), len(job.acquired.lines_left))
    stage = StageTotals(job.identity.stage or 0)
    own = RankReport(ranks.mesh.rank, host_name(), stage, boot=ranks.boot.parts)
    summary = summarize(job, marks.phases(now_s), unfinished, num_preemptions=0, ranks=(own,))
    metrics = summary.added_to(generated_metrics(job.acquired.folder))
    _write_metrics(job.acquired.folder, metrics)
    job.log.info("summary", metrics=metrics)


async def report(job: Job, summary: RunSummary) -> int:
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
