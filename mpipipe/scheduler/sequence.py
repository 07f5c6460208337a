"""A sequence's record and the table of its legal transitions.

`policy` and `steps` choose; `core` orders events. Invariant: `Sequence.state`
changes only through `next_state`: what the table does not list raises, naming state and event.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Protocol

from mpipipe.kv_cache.shared_pages import KnownPage
from mpipipe.scheduler.draft_history import DraftHistory
from mpipipe.types import Request

__all__ = [
    "TRANSITIONS",
    "IllegalTransitionError",
    "Sequence",
    "SequenceEvent",
    "SequenceState",
    "next_state",
]


class SequenceState(enum.IntEnum):
    """Where a sequence is in its life."""

    WAITING = 0  # added, never run
    RUNNING = 1  # in a slot
    PREEMPTED = 2  # lost its slot and its pages: will be recomputed, or restored
    FINISHED = 3  # has its finish reason; steps that contain it may still be in flight
    CLOSED = 4  # no step contains it any more: the stages may forget it


class SequenceEvent(enum.IntEnum):
    """What can happen to a sequence."""

    ADMIT = 0  # gets a place in a slot
    PREEMPT = 1  # its pages are needed by an older sequence, or it starts over
    FINISH = 2  # token limit, stop or cancel
    CLOSE = 3  # nothing of it is in flight any more


_S, _E = SequenceState, SequenceEvent

TRANSITIONS: dict[tuple[SequenceState, SequenceEvent], SequenceState] = {
    (_S.WAITING, _E.ADMIT): _S.RUNNING,
    (_S.PREEMPTED, _E.ADMIT): _S.RUNNING,
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
    """One request on its way, with up to 1 + `lookahead` samples in flight. Compared by identity.

    While it is in a batch, its computed tokens are `base` + the batch's rounds.
    """

    sequence_id: int  # also the order of arrival: a larger id is a younger sequence
    request: Request
    tokens: list[int]  # prompt, then generated: what the CPU knows
    max_tokens: int  # prompt and completion end here with LENGTH
    stop_ids: frozenset[int]
    wants_logprobs: bool
    state: SequenceState = SequenceState.WAITING
    slot: int = -1  # -1: in none
    pages: list[int] = field(default_factory=list)
    # Where its pages are saved while it waits; empty: nowhere, all is computed anew.
    host_pages: tuple[int, ...] = ()
    num_computed: int = 0  # tokens in the KV cache once all steps in flight have run
    num_to_prefill: int = 0  # tokens known at admission: what its chunks compute
    num_promised: int = 0  # pages that admission has set aside for its prefill, not taken yet
    restored_at: int = -1  # number of the step before which its pages were told to come back
    last_step: int = -1  # latest step that contained it; of a row, settled when it leaves
    in_batch: bool = False
    row: int = -1  # in its batch, or in its latest prefill step
    base: int = 0
    ends_at: int = 0  # rounds of the batch when the last of `num_to_sample` is dispatched
    is_open: bool = False  # the stages know it
    restart_tokens: int = 0  # with so many known tokens it starts over once; 0: never
    may_draft: bool = False  # it takes the likeliest tokens, and nothing else is asked of it
    is_drafting: bool = False  # in no batch: its next step verifies drafts, or the latest did
    history: DraftHistory | None = None  # None: nothing was drafted for it yet
    begins: bool = False  # it has a place, and no chunk is dispatched yet
    began_at: int = -1  # number of the step with its first chunk since it last got a place
    num_shared_tokens: int = 0  # that it did not compute then
    # The last page of its prompt that others may find. While it waits: as of the latest look.
    known: KnownPage | None = None
    # Behind which page it is about to compute which tokens, for others that wait for them.
    computing: tuple[KnownPage, tuple[int, ...]] | None = None

    @property
    def is_prefilled(self) -> bool:
        """All chunks are dispatched."""
        return self.num_computed >= self.num_to_prefill

    @property
    def will_restart(self) -> bool:
        """It starts over when its samples until then are dispatched."""
        return self.num_to_prefill < self.restart_tokens < self.max_tokens

    @property
    def num_to_sample(self) -> int:
        """Samples to dispatch after the one of its last chunk, before it ends or starts over."""
        num_tokens = self.restart_tokens if self.will_restart else self.max_tokens
        return num_tokens - self.num_to_prefill - 1

    @property
    def draft_room(self) -> int:
        """Tokens to draft at most while all of it is known; negative: it may not be in such a step.

        Where it starts over follows from steps of one token each.
        """
        most = self.max_tokens - len(self.tokens) - 1
        if self.will_restart:
            most = min(most, self.restart_tokens - len(self.tokens) - 2)
        return most if self.may_draft else -1

    @property
    def rotary_len(self) -> int:
        """As `RequestOpened.rotary_len`, of a sequence whose tokens are all known."""
        num_prompt_tokens = len(self.request.prompt_ids)
        if num_prompt_tokens < self.restart_tokens <= len(self.tokens):
            return self.restart_tokens
        return num_prompt_tokens
