"""`mpipipe run`: runs the job on this rank; the head shows what happens."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import TYPE_CHECKING

from mpipipe.cli.progress_view import ProgressView
from mpipipe.clock import MonotonicClock
from mpipipe.errors import EXIT_REQUEUE, MpipipeError
from mpipipe.metrics.summary_text import summary_lines
from mpipipe.planning.explain import plan_lines
from mpipipe.progress import new_event_loop
from mpipipe.runtime.job import run_job
from mpipipe.runtime.stopping import job_switch, stop_signals
from mpipipe.topology.launcher import detect

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mpipipe.metrics.summary import RunSummary
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.types import Completion

__all__ = ["TerminalView", "run_command"]


class TerminalView:
    """What the head prints: the plan, a live display, completions if wanted, the summary.

    Progress goes to standard error, the rest to standard output.
    """

    def __init__(self, *, show: bool) -> None:
        self._show = show
        self._progress = ProgressView("none", 0, sys.stderr)

    def resumed(self, num_kept: int, num_left: int, folder: Path) -> None:
        """Say how much is left."""
        print(f"Going on in {folder}: {num_kept:,} prompts are done, {num_left:,} are left")

    def planned(self, plan: PipelinePlan, warnings: Sequence[str]) -> None:
        """Print warnings and the plan."""
        for warning in warnings:
            print(f"mpipipe: warning: {warning}", file=sys.stderr)
        print("\n".join(plan_lines(plan)), flush=True)

    def generating(self, num_prompts: int, mode: str) -> None:
        """Start the display."""
        self._progress = ProgressView(mode, num_prompts, sys.stderr)
        self._progress.start()

    def progress(self, done: int, failed: int, output_tokens: int, running: int) -> None:
        """Update the display."""
        self._progress.update(done, failed, output_tokens, running)

    def completed(self, completion: Completion) -> None:
        """Print one completion, or why there is none."""
        if completion.error_kind is not None:
            text = f"mpipipe: prompt {completion.request_id!r}: {completion.error_message}"
            print(text, file=sys.stderr)
        elif self._show:
            print(f"\n[{completion.request_id}] {completion.text.strip()}", flush=True)

    def ended(self) -> None:
        """Close the display."""
        self._progress.close()

    def finished(self, summary: RunSummary, folder: Path) -> None:
        """Print where the time went and where the results are."""
        print("", *summary_lines(summary), f"Results in {folder}", sep="\n", flush=True)

    def stopped(self, reason: str, num_unfinished: int) -> None:
        """Say that there is more to do, and how."""
        text = (
            f"mpipipe: stopped ({reason}): {num_unfinished:,} prompts are not done; run it again "
            "with the same output.dir and output.resume=true to go on"
        )
        print(text, file=sys.stderr, flush=True)


def run_command(config: Path, overrides: Sequence[str], *, show: bool, debug: bool) -> int:
    """Run the job on this rank; returns its exit code.

    Raises:
        MpipipeError: on the head, to be shown once; other ranks return its exit code silently.
    """
    clock = MonotonicClock()
    started_s = clock.now_s() - time.process_time()  # imports so far are part of the boot
    view = TerminalView(show=show)
    stop = job_switch(os.environ)
    try:
        with stop_signals(stop), asyncio.Runner(loop_factory=new_event_loop) as runner:
            job = run_job(
                config, overrides, view, clock, started_s=started_s, stop=stop, debug=debug
            )
            return runner.run(job)
    except MpipipeError as error:
        if error.exit_code == EXIT_REQUEUE and not debug:  # no error: somebody wanted it
            if detect(os.environ).rank in (None, 0):
                print(f"mpipipe: {error}", file=sys.stderr, flush=True)
            return EXIT_REQUEUE
        if detect(os.environ).rank in (None, 0) or debug:
            raise
        return error.exit_code
