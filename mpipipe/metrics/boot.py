"""Where a rank's boot went: from the start of its process to `ready`, cut into named parts.

One part is open at each moment, so that the parts add up to the wall clock by construction. A rank
cuts by itself, before any barrier; the time in which its own work is done and that of others is not
is `wait`. Parts are told as they end, so that the log of a rank that hangs or dies says how far it
came. Called from the event loop and, while that awaits it, from the phase thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from mpipipe.clock import Clock

__all__ = ["PREPROCESSING", "READING", "BootPart", "BootTimeline", "PartName"]

PartName = Literal[
    "process",  # start of the process to the first line of mpipipe
    "imports",  # Python modules, then torch and transformers
    "mpi",  # MPI starts, all ranks connect
    "configuration",
    "handshake",  # who the ranks are and what they have; with a GPU, torch is imported here
    "read prompts",  # with the model's configuration
    "model folder",  # is it whole, and the same on every rank
    "run folder",  # earlier completions are read, locks, the log and the manifest
    "tokenizer",
    "tokenise",
    "plan",
    "build",  # the stage's layers, without weights
    "read weights",
    "convert weights",  # to the run's dtype and the device, then into the layout to compute with
    "kernels",  # compiled beside, and not ready yet
    "cache",
    "warm-up",
    "capture",  # CUDA graphs
    "edges",  # connect to the neighbours, use each edge once
    "wait",  # for other ranks
    "ready",  # what is left until the session takes requests
]
PREPROCESSING: tuple[PartName, ...] = ("tokenizer", "tokenise")
READING: tuple[PartName, ...] = ("read prompts", "read weights")
_SHORT_S = 0.001  # less is no part of its own: it counts for the next


@dataclass(frozen=True, slots=True)
class BootPart:
    """A stretch of a rank's boot, in seconds of the rank's clock."""

    name: str  # a `PartName`
    start_s: float
    seconds: float
    num_bytes: int = 0  # read
    phase: str = ""  # of a wait: what the other ranks were doing

    def fields(self) -> dict[str, Any]:
        """As it stands in `metrics.json`: what does not apply is left out."""
        return {
            "name": self.name,
            "start_s": round(self.start_s, 6),
            "seconds": round(self.seconds, 6),
            **self._more(),
        }

    def event(self) -> dict[str, Any]:
        """As it stands in the rank's log."""
        ends = {"start_s": self.start_s, "end_s": self.start_s + self.seconds}
        rounded = {name: round(value, 6) for name, value in ends.items()}
        return {"name": self.name, **rounded, **self._more()}

    def _more(self) -> dict[str, Any]:
        more: dict[str, Any] = {"bytes": self.num_bytes} if self.num_bytes else {}
        return more | ({"phase": self.phase} if self.phase else {})


class BootTimeline:
    """The parts of one rank's boot.

    Args:
        clock: the rank's.
        started_s: when its process started, by that clock; None: now.
    """

    def __init__(self, clock: Clock, started_s: float | None = None) -> None:
        self.started_s = clock.now_s() if started_s is None else started_s
        self.clock = clock
        self._parts: list[BootPart] = []
        self._open: PartName | None = "process"
        self._since_s = self.started_s
        self._phase = ""
        self._listener: Callable[[BootPart], object] | None = None

    @property
    def parts(self) -> tuple[BootPart, ...]:
        """Those that have ended, in their order: without gaps, without overlap."""
        return tuple(self._parts)

    @property
    def wall_s(self) -> float:
        """From the start to the end of the last part."""
        return self._since_s - self.started_s

    @property
    def open_part(self) -> PartName | None:
        """What the rank is at; None after `end`."""
        return self._open

    def listen(self, listener: Callable[[BootPart], object]) -> None:
        """Tell `listener` each part as it ends, those until now too."""
        for part in self._parts:
            listener(part)
        self._listener = listener

    def begin(self, name: PartName, *, at_s: float | None = None) -> None:
        """The open part ends and `name` begins: now, or `at_s`. Nothing after `end`."""
        if self._open is None:
            return
        at_s = self.clock.now_s() if at_s is None else at_s
        if at_s - self._since_s >= _SHORT_S:
            self._close(at_s)
        self._open, self._phase = name, ""

    def divide(self, name: PartName, seconds: float, num_bytes: int) -> None:
        """The last `seconds` of the open part were `name`, which is the open one now.

        For two kinds of work that alternate: all of one is told before all of the other. The first
        has read `num_bytes`.
        """
        if self._open is None:
            return
        now_s = self.clock.now_s()
        self._close(max(self._since_s, now_s - seconds), num_bytes)
        self._open = name

    @contextmanager
    def waiting(self, phase: str) -> Iterator[None]:
        """Inside, this rank waits for others, which are in `phase`."""
        before = self._open
        if before is None:
            yield
            return
        self.begin("wait")
        self._phase = phase
        try:
            yield
        finally:
            self.begin(before)

    def end(self) -> None:
        """The rank is ready: the last part ends, and nothing is cut any more."""
        if self._open is None:
            return
        now_s = self.clock.now_s()
        if now_s - self._since_s >= _SHORT_S:
            self._close(now_s)
        self._open = None

    def own_s(self, since_s: float) -> float:
        """Seconds of the parts since `since_s` without `wait`."""
        parts = (part for part in self._parts if part.start_s >= since_s)
        return sum(part.seconds for part in parts if part.name != "wait")

    def _close(self, at_s: float, num_bytes: int = 0) -> None:
        assert self._open is not None
        part = BootPart(self._open, self._since_s, at_s - self._since_s, num_bytes, self._phase)
        self._parts.append(part)
        self._since_s, self._phase = at_s, ""
        if self._listener is not None:
            self._listener(part)
