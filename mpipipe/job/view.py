"""What the head of `mpipipe run` shows while it works; the command line draws it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mpipipe.metrics.log import Logger
    from mpipipe.metrics.summary import RunSummary
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.types import Completion

__all__ = ["JobView"]


class JobView(Protocol):
    """What the head shows while the job runs; called on the head only, but for the first two."""

    def log_opened(self, log: Logger) -> None:
        """This rank's log is there, for what cannot be shown."""
        ...

    def warned(self, text: str) -> None:
        """Something that a user should know of, and that the log cannot tell."""
        ...

    def resumed(self, num_kept: int, num_left: int, folder: Path) -> None:
        """The run goes on from an earlier attempt in `folder`."""
        ...

    def planned(self, plan: PipelinePlan, warnings: Sequence[str]) -> None:
        """The plan is agreed, loading begins."""
        ...

    def generating(self, num_prompts: int, mode: str) -> None:
        """Every stage is loaded."""
        ...

    def progress(self, done: int, failed: int, output_tokens: int, running: int) -> None:
        """The state now; called a few times a second."""
        ...

    def completed(self, completion: Completion) -> None:
        """One prompt ended."""
        ...

    def ended(self) -> None:
        """Generation is over, well or not: leave the terminal in order."""
        ...

    def finished(self, summary: RunSummary, folder: Path) -> None:
        """All is written."""
        ...

    def stopped(self, reason: str, num_unfinished: int, folder: Path) -> None:
        """All is written, but some prompts were not reached."""
        ...
