"""What the penalties remember of each sequence, by request row, on the device.

A table takes request rows × vocabulary entries, so each is made with the first sequence that needs
it; graphs hold its address. All calls must be made on the stream that samples. Nothing here waits
for the device.

Shape suffixes: S rows to sample, V vocabulary, N request rows, 1 a column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mpipipe.sampling_options import SamplingNeeds

__all__ = ["TokenHistory"]

# Sizes as `planning.step_limits.HISTORY_BYTES` has them.
_DTYPES = {SamplingNeeds.SEEN: torch.bool, SamplingNeeds.COUNTS: torch.int32}


class TokenHistory:
    """Which tokens each sequence has seen, and how often its completion has each."""

    def __init__(self, num_request_rows: int, vocab_size: int, device: torch.device) -> None:
        self._num_request_rows = num_request_rows
        self._vocab_size = vocab_size
        self._device = device
        self._tables: dict[SamplingNeeds, torch.Tensor] = {}  # [N, V + 1]

    def make(self, needs: SamplingNeeds) -> None:
        """The tables that `needs` calls for, as far as they are not there yet."""
        for need, dtype in _DTYPES.items():
            if need & needs and need not in self._tables:
                # The last column takes the tokens that count for nothing.
                shape = (self._num_request_rows, self._vocab_size + 1)
                self._tables[need] = torch.zeros(shape, dtype=dtype, device=self._device)

    def open(
        self,
        request_row: int,
        token_ids: Sequence[int],
        num_output_tokens: int,
        needs: SamplingNeeds,
    ) -> None:
        """A sequence takes `request_row`; the last `num_output_tokens` of its tokens were sampled.

        Ids that the head cannot produce (a padded embedding) do not count.
        """
        self.make(needs)
        if needs & SamplingNeeds.SEEN:
            self._set_row(SamplingNeeds.SEEN, request_row, token_ids)
        if needs & SamplingNeeds.COUNTS:
            output_ids = token_ids[len(token_ids) - num_output_tokens :]
            self._set_row(SamplingNeeds.COUNTS, request_row, output_ids)

    def _set_row(self, need: SamplingNeeds, request_row: int, token_ids: Sequence[int]) -> None:
        ids = np.asarray(token_ids, dtype=np.int64)
        ids = ids[(ids >= 0) & (ids < self._vocab_size)]
        counts_V = torch.from_numpy(np.bincount(ids, minlength=self._vocab_size))
        row_V = counts_V.to(_DTYPES[need])
        if self._device.type == "cuda":
            # torch keeps pinned memory back from reuse until the copies that read it are done.
            row_V = row_V.pin_memory()
        self._tables[need][request_row, :-1].copy_(row_V, non_blocking=True)

    def add(self, needs: SamplingNeeds, request_rows_S: torch.Tensor, ids_S: torch.Tensor) -> None:
        """Remember the sampled `ids_S` from now on; -1 is no token."""
        if not needs & SamplingNeeds.HISTORY:
            return
        places_S = ids_S.masked_fill(ids_S < 0, self._vocab_size)
        places_S = request_rows_S * (self._vocab_size + 1) + places_S
        if needs & SamplingNeeds.SEEN:
            self._tables[SamplingNeeds.SEEN].view(-1).index_fill_(0, places_S, True)
        if needs & SamplingNeeds.COUNTS:
            ones_S = torch.ones_like(places_S, dtype=torch.int32)
            self._tables[SamplingNeeds.COUNTS].view(-1).index_add_(0, places_S, ones_S)

    def rows_of(self, need: SamplingNeeds, request_rows_S: torch.Tensor) -> torch.Tensor:
        """A copy of the rows of some request rows, [S, V]: bool for `SEEN`, int32 for `COUNTS`."""
        return self._tables[need][:, :-1].index_select(0, request_rows_S)

    def rows(self, request_rows_S: torch.Tensor) -> Mapping[SamplingNeeds, torch.Tensor]:
        """A copy of the rows of some request rows in every table."""
        return {need: self.rows_of(need, request_rows_S) for need in self._tables}

    def put_rows(
        self, request_rows_S: torch.Tensor, rows: Mapping[SamplingNeeds, torch.Tensor]
    ) -> None:
        """Put back what `rows` gave: undoes a trial run."""
        for need, rows_SV in rows.items():
            self._tables[need][:, :-1].index_copy_(0, request_rows_S, rows_SV)
