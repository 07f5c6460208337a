"""What the scheduler core tells its runner to do: one frozen dataclass per instruction.

The steps themselves are `control_plane.messages.StepScheduled` and `DecodeScheduled`. Invariant,
per sequence: any number of tokens in `TokensEmitted`, then `Finished` once, then `Closed` once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mpipipe.metrics.drafts import DraftUse
from mpipipe.types import FinishReason

__all__ = [
    "Closed",
    "Finished",
    "Instruction",
    "Preempted",
    "SchedulerStatistics",
    "TokensEmitted",
]


@dataclass(frozen=True, slots=True)
class TokensEmitted:
    """The tokens of a step, the next one of each sequence's completion."""

    sequence_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reasons: Mapping[int, FinishReason]  # by index into both, of those that end with it


@dataclass(frozen=True, slots=True)
class Finished:
    """No more tokens will come."""

    sequence_id: int
    reason: FinishReason
    token_ids: tuple[int, ...] = field(default=(), compare=False)  # the whole completion


@dataclass(frozen=True, slots=True)
class Preempted:
    """For the log: the sequence gave up its pages; it will be recomputed, or they were saved."""

    sequence_id: int
    num_lost_tokens: int  # tokens to compute again
    num_saved_pages: int = 0  # in host memory


@dataclass(frozen=True, slots=True)
class Closed:
    """Send `RequestClosed`: no step in flight or to come contains these sequences."""

    sequence_ids: tuple[int, ...]


Instruction = TokensEmitted | Finished | Closed


@dataclass(frozen=True, slots=True)
class SchedulerStatistics:
    """A snapshot of the core; as it is made, of one that did nothing yet."""

    num_waiting: int = 0  # preempted ones included
    num_running: int = 0
    num_steps_in_flight: int = 0
    num_free_pages: int = 0
    num_pages: int = 0
    num_steps: int = 0  # since the start, as the following
    num_finished: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0  # lost to preemption
    max_pages_used: int = 0
    num_saved: int = 0  # of the preemptions, those whose pages were saved in host memory
    num_saved_pages: int = 0
    max_host_pages_used: int = 0
    drafts: DraftUse = field(default_factory=DraftUse)
    num_shared_tokens: int = 0  # of prompts, found in shared pages when they first began
