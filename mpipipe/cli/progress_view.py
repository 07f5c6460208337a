"""Live progress on rank 0: a bar on a terminal, plain lines elsewhere, or nothing.

Shows prompts done, output tokens per second, running and waiting sequences and the time left.
It only shows: the caller counts and calls `update` as often as it likes.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, TextIO

from mpipipe.clock import Clock, MonotonicClock
from mpipipe.run_folder.status import duration

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["ProgressView"]

_REDRAW_INTERVAL_S = 0.25  # a redraw costs the head about a millisecond
_MODES = ("auto", "bar", "plain", "none")


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
        self._mode = mode
        self._total = total
        self._stream = stream
        self._clock = clock or MonotonicClock()
        self._interval_s = interval_s
        self._started_s: float | None = None
        self._written_s = 0.0
        self._unwritten_line = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def start(self) -> None:
        """Time starts to count, the bar appears. `update` starts what was not started.

        Raises:
            ValueError: there is no such mode.
        """
        if self._mode not in _MODES:
            raise ValueError(f"progress mode {self._mode!r} is not one of {', '.join(_MODES)}")
        if self._mode == "auto":
            has_bar = self._stream.isatty() and importlib.util.find_spec("rich") is not None
            self._mode = "bar" if has_bar else "plain"
        self._started_s = self._written_s = self._clock.now_s()
        if self._mode == "bar":
            self._open_bar()

    def update(self, done: int, failed: int, output_tokens: int, running: int) -> None:
        """The state now: prompts completed, prompts failed, tokens generated, sequences running."""
        if self._started_s is None:
            self.start()
        assert self._started_s is not None
        elapsed_s = self._clock.now_s() - self._started_s
        finished = done + failed
        tokens_per_s = output_tokens / elapsed_s if elapsed_s > 0 else 0.0
        facts = [f"{output_tokens:,} tokens", f"{tokens_per_s:,.1f} tokens/s", f"{running} running"]
        facts.append(f"{max(0, self._total - finished - running)} waiting")
        if failed:
            facts.append(f"{failed} failed")
        if 0 < finished < self._total:
            facts.append(f"ETA {duration(elapsed_s / finished * (self._total - finished))}")
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=finished, facts=" · ".join(facts))
            self._redraw_bar(self._bar)
        elif self._mode == "plain":
            self._show_line(f"{finished}/{self._total} prompts · {' · '.join(facts)}")

    def close(self) -> None:
        """Show the last state and end the display. Idempotent."""
        if self._unwritten_line:
            self._write_line(self._unwritten_line)
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._mode = "none"

    def _show_line(self, line: str) -> None:
        self._unwritten_line = line
        if self._clock.now_s() - self._written_s >= self._interval_s:
            self._write_line(line)

    def _write_line(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()
        self._written_s = self._clock.now_s()
        self._unwritten_line = ""

    def _redraw_bar(self, bar: Progress) -> None:
        if self._clock.now_s() - self._written_s >= _REDRAW_INTERVAL_S:
            bar.refresh()
            self._written_s = self._clock.now_s()

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("prompts · {task.fields[facts]}"),
            console=Console(file=self._stream, force_terminal=True),
            auto_refresh=False,  # no thread beside the event loop: `update` redraws
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=self._total, facts="starting")
