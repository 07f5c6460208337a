"""A display of progress: a bar on a terminal, plain lines elsewhere, or nothing.

The caller counts, and calls `show` as often as it likes; how often something is drawn is decided
here.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, TextIO

from mpipipe.clock import Clock, MonotonicClock

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["ProgressDisplay"]

_REDRAW_INTERVAL_S = 0.25  # a redraw costs the head about a millisecond
_MODES = ("auto", "bar", "plain", "none")


class ProgressDisplay:
    """One display; `close` ends it.

    Args:
        mode: "bar", "plain", "none", or "auto": a bar if `stream` is a terminal, else plain.
        stream: where to write.
        clock: monotonic seconds.
        interval_s: time between plain lines.
    """

    def __init__(
        self,
        mode: str,
        stream: TextIO,
        *,
        clock: Clock | None = None,
        interval_s: float = 5.0,
    ) -> None:
        self._mode = mode
        self._stream = stream
        self._clock = clock or MonotonicClock()
        self._interval_s = interval_s
        self._started_s: float | None = None
        self._written_s = 0.0
        self._unwritten_line = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds since `start`."""
        return 0.0 if self._started_s is None else self._clock.now_s() - self._started_s

    @property
    def is_started(self) -> bool:
        """Whether time counts."""
        return self._started_s is not None

    def start(self, total: float) -> None:
        """Time starts to count, the bar appears; `show` counts up to `total`.

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
            self._open_bar(total)

    def show(self, completed: float, line: str) -> None:
        """The state now; `line` stands beside the bar, or for itself."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=completed, line=line)
            self._redraw_bar(self._bar)
        elif self._mode == "plain":
            self._unwritten_line = line
            if self._clock.now_s() - self._written_s >= self._interval_s:
                self._write_line(line)

    def close(self) -> None:
        """Show the last state and end the display. Idempotent."""
        if self._unwritten_line:
            self._write_line(self._unwritten_line)
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._mode = "none"

    def _write_line(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()
        self._written_s = self._clock.now_s()
        self._unwritten_line = ""

    def _redraw_bar(self, bar: Progress) -> None:
        if self._clock.now_s() - self._written_s >= _REDRAW_INTERVAL_S:
            bar.refresh()
            self._written_s = self._clock.now_s()

    def _open_bar(self, total: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}", markup=False),
            console=Console(file=self._stream, force_terminal=True),
            auto_refresh=False,  # no thread beside the event loop: `show` redraws
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=total, line="starting")
