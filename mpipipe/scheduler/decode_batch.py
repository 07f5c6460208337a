"""The decode batch of a slot: all rows advance by one token per round, so none is counted by
itself.

What differs between rows is written down once, when a row joins, by the round at which it matters:
which rows need a page (`round` modulo the page size), and which rows sample for the last time. A
round without changes touches only those rows. `change` gives the deltas of a `DecodeScheduled`
message.

`steps` and `slot_allocator` decide which sequence joins or leaves and which page it gets.

Invariants: `rows` is what every stage holds after the latest decode step of the slot; a row that
left stays in it until the next step. Two rounds of one batch share their `Rows` unless rows
changed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceOf

from mpipipe.scheduler.sequence import Sequence

__all__ = ["DecodeBatch", "Rows"]


class Rows:
    """The sequences that a step samples, in order; never changed."""

    __slots__ = ("ids", "sequences", "tokens", "with_logprobs")

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.ids = tuple([sequence.sequence_id for sequence in sequences])
        self.tokens = [sequence.tokens for sequence in sequences]  # the lists themselves
        self.with_logprobs = True in [s.wants_logprobs for s in sequences]


class DecodeBatch:
    """The rows of one slot, as the stages hold them, and when each of them needs something."""

    def __init__(self, page_size: int, lookahead: int) -> None:
        self.rows = Rows([])
        self.round = 0  # decode steps of this slot so far
        self.last_step = -1  # number of the latest of them
        self._leaving: list[int] = []  # rows that the next step removes
        self._page_size = page_size
        # By round modulo page size: the rows whose next token begins a page. Dicts as ordered sets.
        self._page_due: list[dict[Sequence, None]] = [{} for _ in range(page_size)]
        self._ending: dict[int, dict[Sequence, None]] = {}  # by `ends_at`
        self._lookahead = lookahead
        # Of the latest decode steps: number, and the latest prefill step of those who joined in it.
        self._history: deque[tuple[int, int]] = deque(maxlen=1 + lookahead)

    @property
    def num_live(self) -> int:
        """Rows that have not left."""
        return len(self.rows.sequences) - len(self._leaving)

    def live_rows(self) -> list[Sequence]:
        """The rows that have not left, in order."""
        if not self._leaving:
            return self.rows.sequences
        gone = set(self._leaving)
        return [s for row, s in enumerate(self.rows.sequences) if row not in gone]

    def has_room(self, returned: int) -> bool:
        """Whether no row has 1 + `lookahead` samples in flight; steps ≤ `returned` have come back.

        Every row was in the last decode steps, back to the prefill step from which it joined.
        """
        history, lookahead = self._history, self._lookahead
        if len(history) > lookahead and history[0][0] > returned:
            return False
        return len(history) < lookahead or history[-lookahead][1] <= returned

    def rows_needing_pages(self) -> list[Sequence]:
        """The live rows whose token of the next round begins a page."""
        return list(self._page_due[self.round % self._page_size])

    def leave(self, sequence: Sequence) -> None:
        """The row computes nothing more; the next step of the slot removes it."""
        self._leaving.append(sequence.row)
        del self._page_due[-sequence.base % self._page_size][sequence]
        ending = self._ending.get(sequence.ends_at)
        if ending is not None:  # it is, unless it has just ended
            del ending[sequence]
            if not ending:
                del self._ending[sequence.ends_at]
        sequence.num_computed = sequence.base + self.round
        sequence.last_step = self.last_step
        sequence.in_batch = False

    def change(self, joined: SequenceOf[Sequence]) -> tuple[int, ...]:
        """Remove the rows that left, append `joined`; returns the former, ascending."""
        if not self._leaving and not joined:
            return ()
        left = tuple(sorted(self._leaving))
        self._leaving.clear()
        sequences = self.rows.sequences.copy()
        for row in reversed(left):
            del sequences[row]
        first = left[0] if left else len(sequences)
        sequences.extend(joined)
        for row in range(first, len(sequences)):
            sequences[row].row = row
        for sequence in joined:
            self._enter(sequence)
        self.rows = Rows(sequences)
        return left

    def _enter(self, sequence: Sequence) -> None:
        sequence.in_batch = True
        sequence.base = sequence.num_computed - self.round
        sequence.ends_at = self.round + sequence.num_to_sample
        self._page_due[-sequence.base % self._page_size][sequence] = None
        self._ending.setdefault(sequence.ends_at, {})[sequence] = None

    def advance(self, step: int, joined: SequenceOf[Sequence]) -> list[Sequence]:
        """Step `step` is the next round. Returns the rows that sample in it for the last time.

        Those that are to start over among them.
        """
        self.round += 1
        self.last_step = step
        self._history.append((step, max([s.last_step for s in joined], default=-1)))
        return list(self._ending.pop(self.round, ()))
