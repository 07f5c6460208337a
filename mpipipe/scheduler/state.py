"""A sequence's record and the table of its legal transitions.

Not here: any choice (`policy`) or order of events (`core`). Invariant: `Sequence.state` changes
only through `next_state`, so what the table does not list raises, naming state and event.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Protocol

from mpipipe.types import Request

__all__ = [
    "TRANSITIONS",
    "IllegalTransitionError",
    "Sequence",
    "SequenceEvent",
    "SequenceState",
    "Slot",
    "next_state",
]


class SequenceState(enum.IntEnum):
    """Where a sequence is in its life."""

    WAITING = 0  # added, never run
    RUNNING = 1  # in a slot
    PREEMPTED = 2  # lost its pages and its slot; will be recomputed
    FINISHED = 3  # has its finish reason; steps that contain it may still be in flight
    CLOSED = 4  # no step contains it any more: the stages may forget it


class SequenceEvent(enum.IntEnum):
    """What can happen to a sequence."""

    ADMIT = 0  # gets a place in a slot
    SCHEDULE = 1  # gets tokens in a step
    SAMPLE = 2  # a sampled token came back
    PREEMPT = 3  # its pages are needed by an older sequence
    FINISH = 4  # token limit, stop or cancel
    CLOSE = 5  # nothing of it is in flight any more


_S, _E = SequenceState, SequenceEvent

TRANSITIONS: dict[tuple[SequenceState, SequenceEvent], SequenceState] = {
    (_S.WAITING, _E.ADMIT): _S.RUNNING,
    (_S.PREEMPTED, _E.ADMIT): _S.RUNNING,
    (_S.RUNNING, _E.SCHEDULE): _S.RUNNING,
    (_S.RUNNING, _E.SAMPLE): _S.RUNNING,
    (_S.PREEMPTED, _E.SAMPLE): _S.PREEMPTED,  # its step was under way: the token counts
    (_S.FINISHED, _E.SAMPLE): _S.FINISHED,  # cancelled meanwhile: the token is dropped
    (_S.RUNNING, _E.PREEMPT): _S.PREEMPTED,
    (_S.WAITING, _E.FINISH): _S.FINISHED,
    (_S.RUNNING, _E.FINISH): _S.FINISHED,
    (_S.PREEMPTED, _E.FINISH): _S.FINISHED,
    (_S.FINISHED, _E.CLOSE): _S.CLOSED,
}


class IllegalTransitionError(AssertionError):
    """The scheduler drove a sequence through a transition that is not in the table: our bug."""


class _HasState(Protocol):
    sequence_id: int
    state: SequenceState


def next_state(sequence: _HasState, event: SequenceEvent) -> None:
    """Move `sequence` to the state that the table gives for `event`.

    Raises:
        IllegalTransitionError: the table has no entry.
    """
    state = TRANSITIONS.get((sequence.state, event))
    if state is None:
        what = f"sequence {sequence.sequence_id} is {sequence.state.name}"
        raise IllegalTransitionError(f"{what}: {event.name} is not possible")
    sequence.state = state


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way. Compared by identity."""

    sequence_id: int  # also the order of arrival: a larger id is a younger sequence
    request: Request
    tokens: list[int]  # prompt, then generated
    state: SequenceState = SequenceState.WAITING
    slot: int = -1  # -1: in none
    num_computed: int = 0  # tokens in the KV cache once all steps in flight have run
    num_pending: int = 0  # samples in flight (0 or 1)
    num_in_flight: int = 0  # steps in flight that contain this sequence
    pages: list[int] = field(default_factory=list)
    restart_tokens: int = 0  # with so many known tokens it starts over once; 0: never

    @property
    def has_restarted(self) -> bool:
        """It grew to `restart_tokens`."""
        return self.num_prompt_tokens < self.restart_tokens <= len(self.tokens)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def num_left(self) -> int:
        """Known tokens that are not computed yet: 1 when decoding, 0 while a sample is awaited."""
        return len(self.tokens) - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        """Several tokens are left, or the cache is empty: prompt, or recomputation."""
        return self.num_computed == 0 or len(self.tokens) - self.num_computed > 1

    def apply(self, event: SequenceEvent) -> None:
        """Move to the state that the table gives for `event`.

        Raises:
            IllegalTransitionError: the table has no entry.
        """
        next_state(self, event)


@dataclass(slots=True, eq=False)
class Slot:
    """A fixed place in the ring of micro-batches."""

    index: int
    sequences: list[Sequence] = field(default_factory=list)  # oldest first
    num_sampling: int = 0  # steps of this slot in flight that will bring tokens back
