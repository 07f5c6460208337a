"""What `mpipipe run` prints: the plan, a live display, completions, the summary.

`job.run` says when. The display is a bar on a terminal, plain lines elsewhere, or nothing. It shows
prompts done, output tokens per second, running and waiting sequences and the time left; the caller
counts and calls `update` as often as it likes.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from mpipipe.cli.progress_display import ProgressDisplay
from mpipipe.metrics.summary_text import summary_lines
from mpipipe.planning.explain import plan_lines
from mpipipe.run_folder.status import duration
from mpipipe.run_folder.workspace import how_to_go_on

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mpipipe.cli.terminal import Terminal
    from mpipipe.clock import Clock
    from mpipipe.metrics.log import Logger
    from mpipipe.metrics.summary import RunSummary
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.types import Completion

__all__ = ["ProgressView", "TerminalView"]


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
        """Print a warning; standard error that takes none, full or closed, is no reason to end."""
        with suppress(OSError, ValueError):
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
            f"mpipipe: stopped ({reason}): {_prompts_are(num_unfinished)} not done; to go on, "
            f"where the job is not requeued: {how_to_go_on(folder)}"
        )
        print(text, file=sys.stderr, flush=True)


def _prompts_are(number: int) -> str:
    return "1 prompt is" if number == 1 else f"{number:,} prompts are"


class ProgressView:
    """One run's progress display; `close` ends it.

    Args:
        mode: "bar", "plain", "none", or "auto": a bar if `stream` is a terminal, else plain.
        total: prompts of the run.
        stream: where to write.
        clock: monotonic seconds.
        interval_s: time between plain lines.
    """

    def __init__(
        self,
        mode: str,
        total: int,
        stream: TextIO,
        *,
        clock: Clock | None = None,
        interval_s: float = 5.0,
    ) -> None:
        self._total = total
        self._display = ProgressDisplay(mode, stream, clock=clock, interval_s=interval_s)

    def start(self) -> None:
        """Time starts to count, the bar appears. `update` starts what was not started.

        Raises:
            ValueError: there is no such mode.
        """
        self._display.start(self._total)

    def update(self, done: int, failed: int, output_tokens: int, running: int) -> None:
        """The state now: prompts completed, prompts failed, tokens generated, sequences running."""
        if not self._display.is_started:
            self.start()
        elapsed_s = self._display.elapsed_s
        finished = done + failed
        tokens_per_s = output_tokens / elapsed_s if elapsed_s > 0 else 0.0
        facts = [f"{output_tokens:,} tokens", f"{tokens_per_s:,.1f} tokens/s", f"{running} running"]
        facts.append(f"{max(0, self._total - finished - running)} waiting")
        if failed:
            facts.append(f"{failed} failed")
        if done and finished < self._total:  # bad lines fail at once, and tell nothing
            facts.append(f"ETA {duration(elapsed_s / done * (self._total - finished))}")
        self._display.show(finished, f"{finished}/{self._total} prompts · {' · '.join(facts)}")

    def close(self) -> None:
        """Show the last state and end the display. Idempotent."""
        self._display.close()
