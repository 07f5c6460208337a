"""Names what a stage does for a profiler: each step, each replay of a graph.

Here is the kind that names nothing: it hands back what it is given, so a run without a profiler
calls its work directly. `profiling` has the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpipipe.control_plane.messages import DecodeScheduled, StepScheduled

    Step = StepScheduled | DecodeScheduled

__all__ = ["NO_RANGES", "Ranges"]

T = TypeVar("T")


class Ranges:
    """Names nothing, and costs nothing: work is handed back as it came."""

    def step(self, step: Step, work: Callable[[], T]) -> Callable[[], T]:  # noqa: ARG002
        """`work` of a step in a range of its own."""
        return work

    def replay(self, name: str, replay: Callable[[], None]) -> Callable[[], None]:  # noqa: ARG002
        """`replay` of a graph in a range of its own."""
        return replay


NO_RANGES = Ranges()
