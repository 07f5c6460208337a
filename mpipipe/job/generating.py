"""The middle of a run: generate, and write each completion as it ends (head)."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from mpipipe.errors import OutputError
from mpipipe.job.ending import merge_completions
from mpipipe.metrics.summary import RequestTally
from mpipipe.run_folder.files import write_json
from mpipipe.run_folder.journal import CompletionWriter
from mpipipe.run_folder.status_file import UPDATE_INTERVAL_S, RunState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from mpipipe.job.job import Job
    from mpipipe.runtime.requests import PreparedPrompts
    from mpipipe.runtime.session import Session
    from mpipipe.types import Completion

__all__ = ["PROGRESS_INTERVAL_S", "complete"]

PROGRESS_INTERVAL_S = 0.25
_LAST_WRITES_S = 5.0
_LINES_PER_WRITE = 32  # 0.2 ms of the interpreter's time, which the event loop wants, too


async def complete(
    job: Job, session: Session, prompts: PreparedPrompts, manifest: dict[str, Any]
) -> RequestTally:
    """Generate, write each completion as it ends, merge them in input order."""
    folder, view = job.acquired.folder, job.view
    tally = RequestTally()
    view.generating(prompts.num_prompts, job.loaded.config.log.progress)

    def warn(message: str) -> None:
        job.warn(message)
        if not (folder / "manifest.json").exists():  # the whole folder was moved or removed
            write_json(folder / "manifest.json", manifest)

    async with _journal(job, CompletionWriter(folder, session.ranks.mesh.rank, warn)) as writer:
        kept = _KeptCompletions(job, writer)

        def take(completion: Completion) -> None:
            kept.take(completion)
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
    await job.files.run(lambda: merge_completions(job, writer.written))
    return tally


@asynccontextmanager
async def _journal(job: Job, writer: CompletionWriter) -> AsyncIterator[CompletionWriter]:
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


class _KeptCompletions:
    """Completions on their way to the journal, written beside the event loop.

    What ends while the thread writes goes with its next lines: the loop hands over as often as the
    thread is free, not once for each completion.
    """

    def __init__(self, job: Job, writer: CompletionWriter) -> None:
        self._job = job
        self._writer = writer
        self._taken: deque[Completion] = deque()
        self._is_posted = False

    def take(self, completion: Completion) -> None:
        """Have it written soon.

        Raises:
            OutputError: an earlier one could not be written.
        """
        self._taken.append(completion)
        if not self._is_posted:
            self._is_posted = True
            self._job.files.post(self._write)

    def _write(self) -> None:
        self._is_posted = False  # first: what is taken from here on may come too late for this call
        while self._taken:
            num_lines = min(_LINES_PER_WRITE, len(self._taken))
            completions = [self._taken.popleft() for _ in range(num_lines)]
            self._writer.write(*completions)
            for completion in completions:
                self._log(completion)

    def _log(self, completion: Completion) -> None:
        """A prompt that failed, and on the level debug any; `requests.jsonl` has them all."""
        tell = self._job.log.debug if completion.error_kind is None else self._job.log.info
        tell(
            "completed",
            request=completion.request_id,
            finish_reason=completion.finish_reason.value,
            num_prompt_tokens=completion.num_prompt_tokens,
            num_output_tokens=completion.num_output_tokens,
            latency_s=round(completion.latency_s, 6),
            error=completion.error_kind,
        )


async def _show(job: Job, session: Session, tally: RequestTally) -> None:
    """Keep the progress display and the status file alive until cancelled."""
    clock = session.ranks.clock
    told_s = float("-inf")
    while True:
        running, num_tokens = session.num_running, session.num_output_tokens
        job.view.progress(tally.num_completed, tally.num_failed, num_tokens, running)
        if clock.now_s() - told_s >= UPDATE_INTERVAL_S:
            told_s = clock.now_s()
            _tell(job, session, tally)
        await asyncio.sleep(PROGRESS_INTERVAL_S)


def _tell(job: Job, session: Session, tally: RequestTally) -> None:
    """The counts of this moment, into `status.json`."""
    elapsed_s = session.ranks.clock.now_s() - job.marks.loaded_s
    state = RunState.STOPPING if session.ranks.stop.reason else RunState.GENERATING
    left_s = session.ranks.stop.seconds_left
    values = {
        "num_completed": tally.num_completed,
        "num_failed": tally.num_failed,
        "num_running": session.num_running,
        "num_replicas": session.plan.num_replicas,
        "num_output_tokens": session.num_output_tokens,
        "num_shared_tokens": session.num_shared_tokens,
        "num_drafted": session.drafts.num_drafted,
        "num_accepted": session.drafts.num_accepted,
        "tokens_per_s": round(session.num_output_tokens / elapsed_s, 1) if elapsed_s > 0 else 0.0,
        "generating_s": round(elapsed_s, 1),
        "stops_in_s": None if left_s is None else round(left_s),
    }
    with suppress(OutputError):  # of an earlier write: the next completion tells it
        job.files.post(lambda: job.progress.write(state, **values))
