"""`SeatTable`: what a stage remembers of each open sequence, on the host, by *seat*.

A seat is a sequence's index in this stage's tables, on the host (numpy) and on the device
(`last_token`, the seen tokens). A sequence keeps it from its opening to its closing, whatever slot,
row or pages it has meanwhile. Seats are this stage's own affair: no message carries one.

The head decides; this table only follows its messages, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mpipipe.kv_cache.layout import SequenceLens
from mpipipe.sampling_options import SamplingNeeds
from mpipipe.stage.device_sampler import COLUMNS, column_entries

if TYPE_CHECKING:
    from mpipipe.control_plane.messages import RequestOpened, ScheduledSequence

__all__ = ["SeatTable"]


class SeatTable:
    """The open sequences of one stage.

    Args:
        num_seats: sequences that may be open at once; one more seat serves rows without sequence.
        max_pages: pages of the longest sequence.
        vocab_size: of the model, for the sampling columns.
    """

    def __init__(self, num_seats: int, max_pages: int, vocab_size: int) -> None:
        self.num_seats = num_seats
        self.max_pages = max_pages
        self.pages = np.zeros((num_seats, max_pages), dtype=np.int32)
        self.num_pages = np.zeros(num_seats, dtype=np.int32)
        self.num_computed = np.zeros(num_seats, dtype=np.int32)
        self.rotary_len = np.zeros(num_seats, dtype=np.int32)  # as in `RequestOpened`
        self.sampled_in = np.full(num_seats, -1, dtype=np.int64)  # the latest step, of any kind
        self.num_logprobs = np.full(num_seats, -1, dtype=np.int32)
        self.vocab_size = vocab_size
        self.columns = {
            name: np.zeros(num_seats, dtype=column.dtype) for name, column in COLUMNS.items()
        }
        self.needs = np.zeros(num_seats, dtype=np.int64)  # bits of `SamplingNeeds`
        self.tokens: list[tuple[int, ...]] = [()] * num_seats  # prompt; with what is recomputed
        self._seat_of: dict[int, int] = {}
        self._free = list(range(num_seats - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._seat_of)

    def open(self, message: RequestOpened) -> int:
        """Take a seat for a sequence; opened again (to be recomputed), it keeps its seat."""
        seat = self._seat_of.get(message.sequence_id)
        if seat is None:
            assert self._free, f"more than {self.num_seats} sequences are open"
            seat = self._seat_of[message.sequence_id] = self._free.pop()
        sampling = message.sampling
        self.tokens[seat] = tuple(message.prompt_ids)
        self.needs[seat] = sampling.needs.value
        self.num_logprobs[seat] = sampling.num_logprobs
        for name, entry in column_entries(sampling, self.vocab_size).items():
            self.columns[name][seat] = entry
        self.num_pages[seat] = 0
        self.num_computed[seat] = 0
        self.rotary_len[seat] = message.rotary_len
        return seat

    def needs_of(self, seats: np.ndarray) -> SamplingNeeds:
        """What the sequences in `seats` need together."""
        return SamplingNeeds(int(np.bitwise_or.reduce(self.needs[seats])))

    def seat(self, sequence_id: int) -> int:
        """The seat of an open sequence."""
        return self._seat_of[sequence_id]

    def close(self, sequence_ids: Sequence[int]) -> list[int]:
        """Forget finished sequences; return the seats that they had."""
        known = [self._seat_of.pop(i) for i in sequence_ids if i in self._seat_of]
        self._free.extend(known)
        return known

    def open_ids(self) -> list[int]:
        """The sequences that are open."""
        return list(self._seat_of)

    def add_pages(self, seat: int, new_pages: Sequence[int]) -> None:
        """Append to a sequence's page table."""
        first = int(self.num_pages[seat])
        end = first + len(new_pages)
        assert end <= self.max_pages, f"{end} pages for a sequence of at most {self.max_pages}"
        self.pages[seat, first:end] = new_pages
        self.num_pages[seat] = end

    def place(
        self, chunks: Sequence[ScheduledSequence], step: int, first_row: int = 0
    ) -> list[tuple[SequenceLens, Sequence[int]]]:
        """Apply the chunks of a step: page deltas, lengths; each one's span and page table."""
        placed: list[tuple[SequenceLens, Sequence[int]]] = []
        start = first_row
        for scheduled in chunks:
            seat = self._seat_of[scheduled.sequence_id]
            if scheduled.num_computed == 0:
                self.num_pages[seat] = 0
            self.add_pages(seat, scheduled.new_pages)
            end = scheduled.num_computed + scheduled.num_tokens
            self.num_computed[seat] = end
            if scheduled.sample:
                self.sampled_in[seat] = step
            span = SequenceLens(
                seat,  # caches that keep something per sequence know it by its seat
                start,
                scheduled.num_tokens,
                end,
                rotary_len=int(self.rotary_len[seat]),
            )
            placed.append((span, self.pages[seat, : self.num_pages[seat]].tolist()))
            start += scheduled.num_tokens
        return placed

    def input_ids(self, chunks: Sequence[ScheduledSequence]) -> np.ndarray:
        """The token ids that chunks compute: int64 (first stage)."""
        ids: list[int] = []
        for scheduled in chunks:
            history = self.tokens[self._seat_of[scheduled.sequence_id]]
            end = scheduled.num_computed + scheduled.num_tokens
            assert end <= len(history), "the head scheduled tokens that stage 0 does not know"
            ids.extend(history[scheduled.num_computed : end])
        return np.array(ids, dtype=np.int64)

    def sampled_seats(self, chunks: Sequence[ScheduledSequence]) -> np.ndarray:
        """Seats of the chunks that sample, in order: int64 [S]."""
        seats = [self._seat_of[chunk.sequence_id] for chunk in chunks if chunk.sample]
        return np.array(seats, dtype=np.int64)
