"""What the scheduler core tells its runner to do: one frozen dataclass per instruction.

The steps themselves are `control_plane.messages.StepScheduled`. Invariant, per sequence: `Opened`
once, then any number of `Emitted`, `TokensEmitted` and `Preempted`, then `Finished` once, then
`Closed` once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mpipipe.types import FinishReason, Request

__all__ = [
    "Closed",
    "Emitted",
    "Finished",
    "Instruction",
    "Opened",
    "Preempted",
    "SchedulerStatistics",
    "TokensEmitted",
]


@dataclass(frozen=True, slots=True)
class Opened:
    """Send `RequestOpened` to every stage, before any step that contains the sequence."""

    sequence_id: int
    request: Request


@dataclass(frozen=True, slots=True)
class Emitted:
    """A token of a completion, in order. `finish_reason` is set on the last one."""

    sequence_id: int
    request_id: str
    token_id: int
    index_in_output: int  # 0 for the first generated token
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class TokensEmitted:
    """The tokens of a decode step, one for each sequence, as many `Emitted` would say.

    `finish_reasons`: by index into both tuples, for those that end with this token.
    """

    sequence_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reasons: Mapping[int, FinishReason]


@dataclass(frozen=True, slots=True)
class Finished:
    """No more tokens will come."""

    sequence_id: int
    request_id: str
    reason: FinishReason
    token_ids: tuple[int, ...] = field(default=(), compare=False)  # the whole completion


@dataclass(frozen=True, slots=True)
class Preempted:
    """For the log and the metrics: the sequence lost its pages and will be recomputed."""

    sequence_id: int
    num_lost_tokens: int  # tokens to compute again


@dataclass(frozen=True, slots=True)
class Closed:
    """Send `RequestClosed`: no step in flight or to come contains these sequences."""

    sequence_ids: tuple[int, ...]


Instruction = Opened | Emitted | TokensEmitted | Finished | Preempted | Closed


@dataclass(frozen=True, slots=True)
class SchedulerStatistics:
    """A snapshot of the core."""

    num_waiting: int  # preempted ones included
    num_running: int
    num_steps_in_flight: int
    num_free_pages: int
    num_pages: int
    num_steps: int  # since the start, as the following
    num_finished: int
    num_preemptions: int
    num_recomputed_tokens: int  # lost to preemption
    max_pages_used: int
