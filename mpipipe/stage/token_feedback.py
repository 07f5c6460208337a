"""`TokenFeedback`: the tokens that come back to the first stage, into the next steps' input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpipipe.stage.stream import Stream

__all__ = ["RowSlices", "TokenFeedback"]


class RowSlices:
    """The first rows of tensors that live as long as this: a slice costs 40 µs on some hosts."""

    def __init__(self) -> None:
        self._slices: dict[tuple[int, int], torch.Tensor] = {}

    def of(self, tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
        """`tensor[:num_rows]`."""
        key = (tensor.data_ptr(), num_rows)
        rows = self._slices.get(key)
        if rows is None:
            rows = self._slices[key] = tensor[:num_rows]
        return rows


class TokenFeedback:
    """Writes sampled ids to `last_token`.

    Args:
        last_token: int64 [request rows + 1], the last token of every request_row.
        max_rows: of a decode step.
        stream: the device.
        fixed: the request rows of decode steps stay at the same addresses, so that taking may be
        captured.
    """

    def __init__(
        self, last_token: torch.Tensor, *, max_rows: int, stream: Stream, fixed: bool
    ) -> None:
        self._last_token = last_token
        self._arrival = torch.zeros(max_rows, dtype=torch.int64, device=stream.device)
        self._stream = stream
        self._fixed = fixed
        self._slices = RowSlices()
        self._replays: dict[tuple[int, int], Callable[[], None]] = {}

    def buffer(self, num_rows: int) -> torch.Tensor:
        """Where the ids of a decode step arrive: int64 [num_rows]; taken before the next ones."""
        return self._slices.of(self._arrival, num_rows)

    def take(self, request_rows_S: torch.Tensor, ids_S: torch.Tensor) -> None:
        """`ids_S` are now the last tokens of `request_rows_S`."""
        if not self._fixed or ids_S.data_ptr() != self._arrival.data_ptr():
            self._write(request_rows_S, ids_S)
            return
        # A replay costs the host 15 µs, the call itself 50 to 140.
        key = (request_rows_S.data_ptr(), len(request_rows_S))
        replay = self._replays.get(key)
        if replay is None:
            replay = self._stream.capture(lambda: self._write(request_rows_S, ids_S))
            assert replay is not None, "addresses are fixed where the stream can capture"
            self._replays[key] = replay
        replay()

    def _write(self, request_rows_S: torch.Tensor, ids_S: torch.Tensor) -> None:
        self._last_token.index_copy_(0, request_rows_S, ids_S)
