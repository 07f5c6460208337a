"""The steps of a rank, summed while they are read: per part and phase, and the longest ones."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from statistics import median

from mpipipe.logs.reading import Line, RunFiles

__all__ = ["PARTS", "LongStep", "PhaseSteps", "RankSteps", "read_steps"]

PARTS = ("idle", "wait", "transfer", "compute", "overhead", "send")
_FIELDS = itemgetter("start_s", *(f"{part}_s" for part in PARTS))
_LONGEST_S = 1e7  # a step of four months is a damaged line
_NUM_LONG = 256


@dataclass(order=True, frozen=True, slots=True)
class LongStep:
    """One step of a rank; `start_s` is on the rank's own clock."""

    seconds: float  # all parts
    step: int
    slot: int = field(compare=False)
    phase: str = field(compare=False)
    start_s: float = field(compare=False)
    parts_s: Mapping[str, float] = field(compare=False)


@dataclass(slots=True)
class PhaseSteps:
    """The steps of one phase. Per step only two numbers are kept, for percentiles."""

    num_tokens: int = 0
    num_rows: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    compute_s: array[float] = field(default_factory=lambda: array("d"))
    seconds: array[float] = field(default_factory=lambda: array("d"))
    transfer_s: array[float] = field(default_factory=lambda: array("d"))

    @property
    def num_steps(self) -> int:
        """How many there are."""
        return len(self.seconds)


@dataclass(slots=True)
class RankSteps:
    """The steps of one rank in one attempt."""

    parts_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    phases: dict[str, PhaseSteps] = field(default_factory=dict)
    slots: dict[int, int] = field(default_factory=dict)  # slot → steps
    first_s: float = float("inf")  # start of the first step that was kept
    last_s: float = float("-inf")  # end of the last
    first_step: int = -1
    longest: list[LongStep] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        """How many were kept."""
        return sum(phase.num_steps for phase in self.phases.values())

    @property
    def span_s(self) -> float:
        """From the first to the last that was kept."""
        return max(0.0, self.last_s - self.first_s)

    def usual_s(self, phase: str) -> float:
        """The median time of a step of `phase`; 0 without any."""
        steps = self.phases.get(phase)
        return median(steps.seconds) if steps is not None and steps.seconds else 0.0

    def add(self, line: Line) -> None:
        """Count a step.

        Raises:
            KeyError, TypeError, ValueError: the line is damaged; nothing was counted.
        """
        start_s, idle_s, wait_s, transfer_s, compute_s, overhead_s, send_s = _FIELDS(line)
        transfer_s = 0.0 if transfer_s is None else transfer_s  # how the wait divides is not known
        seconds = idle_s + wait_s + transfer_s + compute_s + overhead_s + send_s
        step, slot, phase_name = line["step"], line["slot"], line["phase"]
        num_tokens, num_rows = line["num_tokens"], line["num_rows"]
        bytes_in, bytes_out = line["bytes_in"], line["bytes_out"]
        # Written out: `min` and `all` over them take longer than all the rest.
        if (
            idle_s < 0 or wait_s < 0 or transfer_s < 0 or compute_s < 0 or overhead_s < 0
            or send_s < 0 or step < 0 or slot < 0 or num_tokens < 0 or num_rows < 0
            or bytes_in < 0 or bytes_out < 0
            or not (seconds < _LONGEST_S and -1e18 < start_s < 1e18)
        ):  # fmt: skip
            raise ValueError("a step takes no such time")
        phase = self.phases.get(phase_name)
        if phase is None:
            if not isinstance(phase_name, str):
                raise TypeError("a phase is a word")
            phase = self.phases[phase_name] = PhaseSteps()
        phase.num_tokens += num_tokens
        phase.num_rows += num_rows
        phase.bytes_in += bytes_in
        phase.bytes_out += bytes_out
        phase.seconds.append(seconds)
        phase.compute_s.append(compute_s)
        phase.transfer_s.append(transfer_s)
        parts_s = self.parts_s
        parts_s["idle"] += idle_s
        parts_s["wait"] += wait_s
        parts_s["transfer"] += transfer_s
        parts_s["compute"] += compute_s
        parts_s["overhead"] += overhead_s
        parts_s["send"] += send_s
        self.slots[slot] = self.slots.get(slot, 0) + 1
        if start_s < self.first_s:
            self.first_s, self.first_step = start_s, step
        self.last_s = max(self.last_s, start_s + seconds)
        if len(self.longest) < _NUM_LONG or seconds > self.longest[0].seconds:
            self._keep(seconds, line)

    def _keep(self, seconds: float, line: Line) -> None:
        parts_s = {part: line[f"{part}_s"] or 0.0 for part in PARTS}
        long = LongStep(
            seconds, line["step"], line["slot"], line["phase"], line["start_s"], parts_s
        )
        if len(self.longest) < _NUM_LONG:
            heapq.heappush(self.longest, long)
        else:
            heapq.heapreplace(self.longest, long)


def read_steps(files: RunFiles, rank: int, attempt: int) -> RankSteps:
    """Sum up the steps of `rank` in `attempt`; damaged lines are counted in `files`."""
    steps = RankSteps()
    for name, line in files.step_lines(rank, attempt):
        try:
            steps.add(line)
        except (KeyError, TypeError, ValueError, OverflowError):
            files.add_torn(name)
    return steps
