"""`mpipipe run`: runs the job on this rank; the head shows what happens.

Little is imported before signals are taken: a job may be told to stop at once, on a file system
that takes seconds for an import.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from typing import TYPE_CHECKING

from mpipipe import IMPORTED_S
from mpipipe.cli.terminal import guard_terminal
from mpipipe.clock import MonotonicClock
from mpipipe.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_REQUEUE, MpipipeError
from mpipipe.job.supervision import open_rank_page
from mpipipe.job.supervisor import end_with, supervise, watch_supervisor
from mpipipe.metrics.boot import BootTimeline
from mpipipe.runtime.stop_switch import StopSwitch, keep_wall_time, stop_signals
from mpipipe.topology.host import host_name
from mpipipe.topology.launcher import detect
from mpipipe.topology.process import process_age_s

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Any

__all__ = ["run_command"]


def run_command(config: Path, overrides: Sequence[str], *, show: bool, debug: bool) -> int:
    """Run the job on this rank, under a supervisor if a launcher started it; the exit code.

    Raises:
        MpipipeError: on the head, to be shown once; other ranks return its exit code silently.
    """
    boot = _boot_so_far(MonotonicClock())  # the supervisor's part of it, too
    terminal = guard_terminal()
    info, page, stop = detect(os.environ), open_rank_page(), StopSwitch()
    supervisor, watch = None, None
    if info.mpi_expected:
        supervisor = supervise(info, page)
        watch = watch_supervisor(supervisor, page, stop)
    exit_code = EXIT_BUG
    try:
        faulthandler.enable()  # a fault in native code: the Python lines that led to it
        with stop_signals(stop, watch):
            keep_wall_time(stop, os.environ)
            # A stop so far is told when all ranks have met: they end together, in order.
            from mpipipe.cli.run_view import TerminalView
            from mpipipe.job.run import run_job
            from mpipipe.progress import run_async

            view = TerminalView(terminal, show=show)
            job = run_job(
                config, overrides, view, boot,
                stop=stop, page=page, examine=_examine_node, debug=debug,
            )  # fmt: skip
            exit_code = run_async(job)
    except MpipipeError as error:
        exit_code = error.exit_code
        if debug:
            raise
        if info.rank in (None, 0):
            if exit_code not in {EXIT_REQUEUE, EXIT_INTERRUPTED}:
                raise
            print(f"mpipipe: {error}", file=sys.stderr, flush=True)  # no error: it was wanted
    finally:
        page.ended(exit_code)
        if supervisor is not None:
            end_with(supervisor)
    return exit_code


def _boot_so_far(clock: MonotonicClock) -> BootTimeline:
    """From the start of this process, which a fork does not begin anew."""
    age_s = process_age_s()
    started_s = IMPORTED_S if age_s is None else min(IMPORTED_S, clock.now_s() - age_s)
    boot = BootTimeline(clock, started_s)
    boot.begin("imports", at_s=IMPORTED_S)
    return boot


def _examine_node(num_ranks: int) -> list[dict[str, Any]]:
    """The doctor's findings about this node that cost nothing: memory, shared memory, limits."""
    from mpipipe.doctor.checks.ranks import check_node
    from mpipipe.doctor.probes.process import probe_node

    findings = check_node(probe_node(os.environ), num_ranks=num_ranks)
    return [finding.at(host_name()).to_dict() for finding in findings]
