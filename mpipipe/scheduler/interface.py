"""What the runner needs of a scheduler core; `core` and `ahead` have it.

`core.SchedulerCore` awaits every token before it schedules the next. `ahead.AheadCore` schedules
ahead of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mpipipe.control_plane.messages import DecodeScheduled, StepScheduled
from mpipipe.scheduler.instructions import Instruction, Preempted, SchedulerStatistics
from mpipipe.types import FinishReason, Request

__all__ = ["Scheduler"]


class Scheduler(Protocol):
    """A machine without loop, clock and I/O: events in, steps and instructions out."""

    max_sequence_tokens: int

    def add(self, request: Request) -> list[Instruction]:
        """Queue a request.

        Raises:
            PromptError: it can never run.
        """
        ...

    def next_step(self) -> StepScheduled | DecodeScheduled | None:
        """The next micro-batch to send; None: nothing can run before an event."""
        ...

    def sampled(self, step: int, token_ids: Sequence[int]) -> list[Instruction]:
        """A step came back with one id per sampled sequence, in the order of the step."""
        ...

    def stop(self, sequence_id: int, reason: FinishReason) -> list[Instruction]:
        """End a sequence from outside; nothing happens to one that has ended."""
        ...

    def logprob_rows(self, step: int) -> tuple[int, ...]:
        """The sequences that a step in flight samples, in order, if one asked for logprobs.

        Empty: none did, and no `LogprobsSampled` comes.
        """
        ...

    def reopened_tokens(self, sequence_id: int, /) -> tuple[int, ...] | None:
        """Tokens with which the stages must be told again of a sequence that starts over.

        None: the stages know them.
        """
        ...

    def rotary_len(self, sequence_id: int, /) -> int:
        """`RequestOpened.rotary_len` of a sequence that starts, or starts over, now."""
        ...

    def take_preemptions(self) -> list[Preempted]:
        """Who was preempted since the last call of this, in order: for the log."""
        ...

    def statistics(self) -> SchedulerStatistics:
        """Counts of this moment and since the start."""
        ...
