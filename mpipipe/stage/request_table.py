"""`RequestTable`: what a stage remembers of each open sequence, on the host, by *request row*.

A request row is a sequence's index in this stage's tables, on the host (numpy) and on the device
(`last_token`, the seen tokens). A sequence keeps it from its opening to its closing, whatever slot,
row or pages it has meanwhile. Request rows are this stage's own affair: no message carries one.

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
    from mpipipe.control_plane.messages import (
        PagesRestored,
        RequestOpened,
        ScheduledSequence,
        VerifiedSequence,
    )

__all__ = ["Placed", "RequestTable"]

Placed = tuple[SequenceLens, Sequence[int]]  # a sequence in a step, and its page table


class RequestTable:
    """The open sequences of one stage.

    Args:
        num_request_rows: sequences that may be open at once; one more serves rows
        without sequence.
        max_pages: pages of the longest sequence.
        vocab_size: of the model, for the sampling columns.
        page_size: tokens per page.
    """

    def __init__(
        self, num_request_rows: int, max_pages: int, vocab_size: int, page_size: int
    ) -> None:
        self.num_request_rows = num_request_rows
        self.max_pages = max_pages
        self.page_size = page_size
        self.pages = np.zeros((num_request_rows, max_pages), dtype=np.int32)
        self.num_pages = np.zeros(num_request_rows, dtype=np.int32)
        self.num_computed = np.zeros(num_request_rows, dtype=np.int32)
        self.rotary_len = np.zeros(num_request_rows, dtype=np.int32)  # as in `RequestOpened`
        # The latest step, of any kind.
        self.sampled_in = np.full(num_request_rows, -1, dtype=np.int64)
        self.num_logprobs = np.full(num_request_rows, -1, dtype=np.int32)
        self.vocab_size = vocab_size
        self.columns = {
            name: np.zeros(num_request_rows, dtype=column.dtype) for name, column in COLUMNS.items()
        }
        self.needs = np.zeros(num_request_rows, dtype=np.int64)  # bits of `SamplingNeeds`
        # The prompt; with what is recomputed.
        self.tokens: list[tuple[int, ...]] = [()] * num_request_rows
        self._request_row_of: dict[int, int] = {}
        self._free = list(range(num_request_rows - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._request_row_of)

    def open(self, message: RequestOpened) -> int:
        """Take a row for a sequence; opened again (to be recomputed), it keeps its row."""
        request_row = self._request_row_of.get(message.sequence_id)
        if request_row is None:
            assert self._free, f"more than {self.num_request_rows} sequences are open"
            request_row = self._request_row_of[message.sequence_id] = self._free.pop()
        sampling = message.sampling
        self.tokens[request_row] = tuple(message.prompt_ids)
        self.needs[request_row] = sampling.needs.value
        self.num_logprobs[request_row] = sampling.num_logprobs
        for name, entry in column_entries(sampling, self.vocab_size).items():
            self.columns[name][request_row] = entry
        self.num_pages[request_row] = 0
        self.num_computed[request_row] = 0
        self.rotary_len[request_row] = message.rotary_len
        return request_row

    def needs_of(self, request_rows: np.ndarray) -> SamplingNeeds:
        """What the sequences in `request_rows` need together."""
        return SamplingNeeds(int(np.bitwise_or.reduce(self.needs[request_rows])))

    def row(self, sequence_id: int) -> int:
        """The request row of an open sequence."""
        return self._request_row_of[sequence_id]

    def close(self, sequence_ids: Sequence[int]) -> list[int]:
        """Forget finished sequences; return the request rows that they had."""
        known = [self._request_row_of.pop(i) for i in sequence_ids if i in self._request_row_of]
        self._free.extend(known)
        return known

    def open_ids(self) -> list[int]:
        """The sequences that are open."""
        return list(self._request_row_of)

    def add_pages(self, request_row: int, new_pages: Sequence[int]) -> None:
        """Append to a sequence's page table."""
        first = int(self.num_pages[request_row])
        end = first + len(new_pages)
        assert end <= self.max_pages, f"{end} pages for a sequence of at most {self.max_pages}"
        self.pages[request_row, first:end] = new_pages
        self.num_pages[request_row] = end

    def add_a_page_each(self, request_rows: np.ndarray, new_pages: Sequence[int]) -> np.ndarray:
        """Append a page to each of several page tables; returns the places where they stand."""
        places: np.ndarray = self.num_pages[request_rows]
        assert places.max() < self.max_pages, f"a sequence has {self.max_pages} pages at most"
        self.pages[request_rows, places] = new_pages
        self.num_pages[request_rows] = places + 1
        return places

    def restore(self, message: PagesRestored) -> None:
        """A sequence goes on, with all its computed tokens in other pages."""
        request_row = self._request_row_of[message.sequence_id]
        self.num_pages[request_row] = 0
        self.add_pages(request_row, message.pages)
        self.num_computed[request_row] = message.num_computed

    def pages_of(self, sequence_id: int) -> list[int]:
        """The page table of an open sequence."""
        request_row = self._request_row_of[sequence_id]
        pages: list[int] = self.pages[request_row, : self.num_pages[request_row]].tolist()
        return pages

    def place(
        self, chunks: Sequence[ScheduledSequence], step: int, first_row: int = 0
    ) -> list[Placed]:
        """Apply the chunks of a step: page deltas, lengths; the lengths and page table of each."""
        placed: list[Placed] = []
        start = first_row
        for scheduled in chunks:
            request_row = self._request_row_of[scheduled.sequence_id]
            if scheduled.num_computed == 0:
                self.num_pages[request_row] = 0
            self.add_pages(request_row, scheduled.new_pages)
            end = scheduled.num_computed + scheduled.num_tokens
            self.num_computed[request_row] = end
            if scheduled.sample:
                self.sampled_in[request_row] = step
            seq_len = SequenceLens(
                request_row,  # caches that keep something per sequence know it by its request row
                start,
                scheduled.num_tokens,
                end,
                rotary_len=int(self.rotary_len[request_row]),
            )
            placed.append(
                (seq_len, self.pages[request_row, : self.num_pages[request_row]].tolist())
            )
            start += scheduled.num_tokens
        return placed

    def place_drafts(self, verified: Sequence[VerifiedSequence], step: int) -> list[Placed]:
        """As `place`, of sequences whose last token and draft a step computes."""
        placed: list[Placed] = []
        start = 0
        for drafted in verified:
            request_row = self._request_row_of[drafted.sequence_id]
            self.num_pages[request_row] = -(-drafted.num_computed // self.page_size)
            self.add_pages(request_row, drafted.new_pages)
            num_tokens = len(drafted.token_ids)
            end = drafted.num_computed + num_tokens
            self.num_computed[request_row] = end
            self.sampled_in[request_row] = step
            pages = self.pages[request_row, : self.num_pages[request_row]].tolist()
            placed.append((SequenceLens(request_row, start, num_tokens, end), pages))
            start += num_tokens
        return placed

    def input_ids(self, chunks: Sequence[ScheduledSequence]) -> np.ndarray:
        """The token ids that chunks compute: int64 (first stage)."""
        ids: list[int] = []
        for scheduled in chunks:
            history = self.tokens[self._request_row_of[scheduled.sequence_id]]
            end = scheduled.num_computed + scheduled.num_tokens
            assert end <= len(history), "the head scheduled tokens that stage 0 does not know"
            ids.extend(history[scheduled.num_computed : end])
        return np.array(ids, dtype=np.int64)

    def sampled_request_rows(self, chunks: Sequence[ScheduledSequence]) -> np.ndarray:
        """Request rows of the chunks that sample, in order: int64 [S]."""
        request_rows = [self._request_row_of[chunk.sequence_id] for chunk in chunks if chunk.sample]
        return np.array(request_rows, dtype=np.int64)
