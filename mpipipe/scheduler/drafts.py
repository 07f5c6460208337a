"""When drafts pay, and how many tokens of them: `Drafter` decides for the sequences of a slot.

A step verifies the drafts of all its sequences at once; the head keeps those tokens that the model
would have chosen itself (`agreed`), so greedy completions stay as they are. Such a step awaits the
tokens before it and computes more rows. Both cost time, so drafts are made only where they gain by
the step times that the plan predicts and by how often each sequence was foreseen lately.

`draft_history` finds drafts, `steps` makes the steps, `core` accepts. Pure: no clock, no chance.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as SequenceOf
from math import prod
from typing import TYPE_CHECKING, Protocol

from mpipipe.scheduler.draft_history import DraftHistory

if TYPE_CHECKING:
    from mpipipe.planning.plan import DraftPlan
    from mpipipe.scheduler.sequence import Sequence

__all__ = ["Drafter", "NgramDrafter", "agreed"]

_LEAST_GAIN = 1.08  # predicted: step times and chances are estimates
# Looking up costs the head 15 to 20 µs a sequence and step (measured on two busy cores).
_MOST_SEQUENCES = 8


class Drafter(Protocol):
    """Decides on the drafts of a slot's sequences."""

    max_rows: int  # of a step that verifies
    max_sequences: int  # of a slot that is considered
    alone: bool  # only while no other slot has sequences

    def expects_gain(self, sequences: SequenceOf[Sequence]) -> bool:
        """Whether to await their tokens in flight, as drafts may well pay then."""
        ...

    def propose(
        self, sequences: SequenceOf[Sequence], rooms: SequenceOf[int]
    ) -> list[tuple[int, ...]]:
        """A draft of each, of at most as many tokens as its room; empty: no step should verify.

        All their tokens are known. Drafts and a row of each sequence are `max_rows` at most.
        """
        ...


def agreed(draft: SequenceOf[int], sampled: SequenceOf[int]) -> int:
    """How many drafted tokens the model chose itself: `sampled[i]` follows `draft[:i]`."""
    count = 0
    while count < len(draft) and draft[count] == sampled[count]:
        count += 1
    return count


class NgramDrafter:
    """Drafts from each sequence's own text, while the plan's step times promise a gain.

    Args:
        plan: how many tokens at most, and what steps cost.
    """

    def __init__(self, plan: DraftPlan) -> None:
        self.max_rows = plan.rows[-1]
        self.max_sequences = min(_MOST_SEQUENCES, plan.rows[-1] // 2)
        self.alone = plan.alone
        self._plan = plan

    def expects_gain(self, sequences: SequenceOf[Sequence]) -> bool:
        """See `Drafter`. A draft has a chance only if what is in flight turns out as foreseen."""
        chances = []
        for sequence in sequences:
            history = _history_of(sequence)
            chances.append(history.chance if history.draft(1) else 0.0)
        if not any(chances):
            return False
        none = prod([1 - chance for chance in chances])  # of them turns out as foreseen
        num_tokens = _mean_length(sequences)
        plain_s = self._step_s(len(chances), num_tokens)
        for count in range(1, self._most_tokens(len(chances)) + 1):
            made = sum([1 + chance * (_expected(chance, count) - 1) for chance in chances])
            num_rows = len(chances) + count * sum([chance > 0 for chance in chances])
            taken_s = (1 - none) * self._step_s(num_rows, num_tokens) + none * plain_s
            taken_s += self._plan.awaited_s
            if made * plain_s >= _LEAST_GAIN * len(chances) * taken_s:
                return True
        return False

    def propose(
        self, sequences: SequenceOf[Sequence], rooms: SequenceOf[int]
    ) -> list[tuple[int, ...]]:
        """See `Drafter`: the number of tokens with the highest predicted rate."""
        most = self._most_tokens(len(sequences))
        histories = [_history_of(sequence) for sequence in sequences]
        drafts = [
            history.draft(min(most, room)) for history, room in zip(histories, rooms, strict=True)
        ]
        chances = [history.chance for history in histories]
        num_tokens = _mean_length(sequences)
        plain_s = self._step_s(len(sequences), num_tokens)
        best, best_count = _LEAST_GAIN, 0
        for count in range(1, max(map(len, drafts)) + 1):
            lengths = [min(count, len(draft)) for draft in drafts]
            taken_s = self._step_s(len(drafts) + sum(lengths), num_tokens) + self._plan.awaited_s
            gain = sum(map(_expected, chances, lengths)) * plain_s / (len(drafts) * taken_s)
            if gain >= best:
                best, best_count = gain, count
        return [draft[:best_count] for draft in drafts] if best_count else []

    def _most_tokens(self, num_sequences: int) -> int:
        return min(self._plan.max_tokens, self.max_rows // num_sequences - 1)

    def _step_s(self, num_rows: int, num_tokens: float) -> float:
        """Of a step of so many rows through all stages; graphs compute the next larger number."""
        plan = self._plan
        place = min(bisect_left(plan.rows, num_rows), len(plan.rows) - 1)
        return plan.step_s[place] + plan.key_s * num_rows * num_tokens


def _history_of(sequence: Sequence) -> DraftHistory:
    """The sequence's history, up to its last known token."""
    if sequence.history is None:
        sequence.history = DraftHistory(sequence.tokens, len(sequence.request.prompt_ids))
    sequence.history.read()
    return sequence.history


def _expected(chance: float, num_tokens: int) -> float:
    """Tokens that a draft of `num_tokens` is expected to make, with the one behind those kept."""
    return sum([chance**place for place in range(num_tokens + 1)])


def _mean_length(sequences: SequenceOf[Sequence]) -> float:
    return sum([len(sequence.tokens) for sequence in sequences]) / len(sequences)
