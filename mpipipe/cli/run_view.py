"""What `mpipipe run` prints: the plan, a live display, completions, the summary.

`job.run` says when.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mpipipe.cli.progress_view import ProgressView
from mpipipe.metrics.summary_text import summary_lines
from mpipipe.planning.explain import plan_lines
from mpipipe.run_folder.workspace import how_to_go_on

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mpipipe.cli.terminal import Terminal
    from mpipipe.metrics.log import Logger
    from mpipipe.metrics.summary import RunSummary
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.types import Completion

__all__ = ["TerminalView"]


class TerminalView:
    """What the head prints: the plan, a live display, completions if wanted, the summary.

    Progress goes to standard error, the rest to standard output.
    """

    def __init__(self, terminal: Terminal, *, show: bool) -> None:
        self._terminal = terminal
        self._show = show
        self._progress = ProgressView("none", 0, sys.stderr)

    def log_opened(self, log: Logger) -> None:
        """Let `log` know when nothing more can be printed."""
        self._terminal.listen(lambda text: log.warning("terminal", message=text))

    def warned(self, text: str) -> None:
        """Print a warning."""
        print(f"mpipipe: warning: {text}", file=sys.stderr, flush=True)

    def resumed(self, num_kept: int, num_left: int, folder: Path) -> None:
        """Say how much is left."""
        print(f"Going on in {folder}: {num_kept:,} prompts are done, {num_left:,} are left")

    def planned(self, plan: PipelinePlan, warnings: Sequence[str]) -> None:
        """Print warnings and the plan."""
        for warning in warnings:
            self.warned(warning)
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

    def stopped(self, reason: str, num_unfinished: int, folder: Path) -> None:
        """Say that there is more to do, and how."""
        text = (
            f"mpipipe: stopped ({reason}): {num_unfinished:,} prompts are not done; to go on, "
            f"where the job is not requeued: {how_to_go_on(folder)}"
        )
        print(text, file=sys.stderr, flush=True)
