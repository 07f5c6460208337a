"""What a stage knows from the head's messages: the rows of every slot and how long they have grown.

From it follows the work of a step (`StepWork`) and which earlier step's tokens it reads.

Invariant: as on a real stage (`stage/decode_batch.py`), only messages change what is known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mpipipe.control_plane.messages import (
    DecodeScheduled,
    PagesRestored,
    ScheduledSequence,
    StepScheduled,
)
from mpipipe.planning.padding import padded_tokens
from mpipipe.simulation.stage_times import StepWork

__all__ = ["FollowedSteps", "Step"]

Step = StepScheduled | DecodeScheduled

# Contexts are counted in parts of this size, so that few kinds of work have to be timed.
_CONTEXT_GRAIN = 8


@dataclass(slots=True)
class _SlotRows:
    """The decode batch of a slot, as all stages hold it."""

    ids: list[int] = field(default_factory=list)  # sequences
    offsets: list[int] = field(default_factory=list)  # tokens in the cache, less `rounds`
    sum_of_offsets: int = 0
    rounds: int = 0
    last_step: int = -1  # the latest that sampled the rows


class FollowedSteps:
    """Follows the steps of one replica in their order.

    Args:
        num_slots: in the ring.
        pads: attention reads all rows of a step as `planning.padding` has it.
    """

    def __init__(self, num_slots: int, *, pads: bool = False) -> None:
        self._pads = pads
        self._slots = [_SlotRows() for _ in range(num_slots)]
        # Of sequences whose prompt is computed, or whose pages came back, and that are in no batch:
        # tokens, and by which step.
        self._prefilled: dict[int, tuple[int, int]] = {}

    @property
    def num_slots(self) -> int:
        """In the ring."""
        return len(self._slots)

    def follow(self, step: Step) -> tuple[StepWork, int]:
        """The work of `step`, and the latest step whose tokens it reads; -1: it reads none."""
        chunks = step.sequences if isinstance(step, StepScheduled) else step.chunks
        rows, context_tokens, needed = 0, 0.0, -1
        if isinstance(step, DecodeScheduled):
            rows, context_tokens, needed = self._decode(step)
        num_tokens, context = self._prefill(step.step, chunks)
        work = StepWork(
            rows=rows,
            context_tokens=_grained(context_tokens),
            chunk_tokens=num_tokens,
            chunk_context_tokens=_grained(context),
            num_sampled=step.num_sampled,
        )
        return work, needed

    def restore(self, restored: PagesRestored) -> None:
        """A sequence goes on with the tokens in its pages, all of which the head knows."""
        self._prefilled[restored.sequence_id] = (restored.num_computed, -1)

    def sampled(self, step: Step) -> tuple[int, ...]:
        """The sequences that `step`, the latest that was followed, samples, in its order."""
        chunks = step.sequences if isinstance(step, StepScheduled) else step.chunks
        prompts = tuple([chunk.sequence_id for chunk in chunks if chunk.sample])
        if isinstance(step, StepScheduled):
            return prompts
        return (*self._slots[step.slot].ids, *prompts)

    def _decode(self, step: DecodeScheduled) -> tuple[int, float, int]:
        slot = self._slots[step.slot]
        needed = slot.last_step if len(slot.ids) > len(step.left) else -1
        for row in reversed(step.left):
            del slot.ids[row]
            slot.sum_of_offsets -= slot.offsets.pop(row)
        for sequence_id in step.joined:
            num_tokens, sampled_in = self._prefilled.pop(sequence_id)
            needed = max(needed, sampled_in)
            slot.ids.append(sequence_id)
            slot.offsets.append(num_tokens - slot.rounds)
            slot.sum_of_offsets += slot.offsets[-1]
        slot.rounds += 1
        slot.last_step = step.step
        rows = len(slot.ids)
        assert rows == step.num_rows, f"step {step.step}: {rows} rows, and {step.num_rows} sent"
        if self._pads:
            tokens = padded_tokens([offset + slot.rounds for offset in slot.offsets])
            return rows, tokens / rows, needed
        return rows, slot.sum_of_offsets / rows + slot.rounds, needed

    def _prefill(self, step: int, chunks: Sequence[ScheduledSequence]) -> tuple[int, float]:
        num_tokens, pairs = 0, 0.0
        for chunk in chunks:
            num_tokens += chunk.num_tokens
            pairs += chunk.num_tokens * (chunk.num_computed + chunk.num_tokens / 2)
            if chunk.sample:
                computed = chunk.num_computed + chunk.num_tokens
                self._prefilled[chunk.sequence_id] = (computed, step)
        return num_tokens, pairs / num_tokens if num_tokens else 0.0


def _grained(tokens: float) -> int:
    """`tokens` rounded to the grain; at least one grain, unless there are none."""
    if not tokens:
        return 0
    return max(1, round(tokens / _CONTEXT_GRAIN)) * _CONTEXT_GRAIN
