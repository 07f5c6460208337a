"""`DecodeBatch`: one slot's decoding sequences, as rows, on the host and on the device.

The rows follow the head's `DecodeScheduled` deltas. While a batch does not change, a step needs no
copy at all: lengths and positions advance on the device. When a page was added, the page tables are
uploaded; when a sequence left or joined, the whole batch: in one copy each from the host's mirror,
which knows all of it but the tokens; those never leave the device (`last_token`).

A step that verifies drafts takes the place of the rows: its rows are tokens of the same few
sequences, one position behind the other, that share a page table. All is uploaded for it, its
tokens as well, which `last_token` holds for it beyond the request rows of sequences.

Rows without a sequence, which fill a batch up to its graph's size, have length 0, sit in the last
request row and write to the last page of the cache, which belongs to no sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from mpipipe.kv_cache.common_tables import CommonTables, fill_tables, table_fields
from mpipipe.sampling_options import SamplingNeeds
from mpipipe.stage.device_sampler import COLUMNS, SamplingColumns, column_entries
from mpipipe.types import SamplingParams

if TYPE_CHECKING:
    from mpipipe.control_plane.messages import DecodeScheduled
    from mpipipe.stage.request_table import Placed, RequestTable
    from mpipipe.stage.stream import Stream

__all__ = ["DecodeBatch", "PackedArrays"]

_WHOLE_TABLE_BYTES = 1 << 20  # up to here one copy of all is faster than a copy of some
_ROW_MULTIPLE = 8  # keeps every array of the packed buffer aligned to 8 bytes


class PackedArrays:
    """Numpy arrays that lie in one buffer, with tensors of the same names on the device."""

    def __init__(
        self,
        host: dict[str, np.ndarray],
        device: dict[str, torch.Tensor],
        *,
        buffers: tuple[np.ndarray, torch.Tensor],
        stream: Stream,
    ) -> None:
        self.host = host
        self.device = device
        self._buffers = buffers
        self._stream = stream

    @classmethod
    def allocate(
        cls, fields: dict[str, tuple[tuple[int, ...], type]], stream: Stream
    ) -> PackedArrays:
        """Zeros. `fields`: name → (shape, dtype), 8-byte types first, sizes of whole 8 bytes."""
        sizes = [int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in fields.values()]
        host_buffer = np.zeros(sum(sizes), dtype=np.uint8)
        device_buffer = torch.zeros(sum(sizes), dtype=torch.uint8, device=stream.device)
        host: dict[str, np.ndarray] = {}
        device: dict[str, torch.Tensor] = {}
        start = 0
        for (name, (shape, kind)), size in zip(fields.items(), sizes, strict=True):
            part = slice(start, start + size)
            host[name] = host_buffer[part].view(kind).reshape(shape)
            dtype = torch.from_numpy(np.empty(0, kind)).dtype
            device[name] = device_buffer[part].view(dtype).view(shape)
            start += size
        return cls(host, device, buffers=(host_buffer, device_buffer), stream=stream)

    def upload(self) -> None:
        """Make the device's side equal to the host's, in the order of the stream."""
        self._stream.upload_into(*self._buffers)


class DecodeBatch:
    """The rows of one slot.

    Args:
        request_rows: this stage's sequences.
        stream: the device.
        max_rows: of a step at most.
        unused: the request row and the page of rows without a sequence.
        groups_rows: find the rows that begin with the same pages.
    """

    def __init__(
        self,
        request_table: RequestTable,
        stream: Stream,
        *,
        max_rows: int,
        unused: tuple[int, int],
        groups_rows: bool = False,
    ) -> None:
        rows = -(-max_rows // _ROW_MULTIPLE) * _ROW_MULTIPLE
        self.max_rows = max_rows
        self._request_table = request_table
        self._unused_request_row, self._unused_page = unused
        self._rows = np.empty(0, dtype=np.int64)  # the request row of each row
        fields = _fields(rows, request_table, groups_rows)
        self._arrays = PackedArrays.allocate(fields, stream)
        shape = (rows, request_table.max_pages)
        self._pages = PackedArrays.allocate({"pages": (shape, np.int32)}, stream)
        self._stream = stream
        self._neutral = column_entries(SamplingParams(), request_table.vocab_size)
        # Request rows, active, kv_len [rows], pages [rows, P], and the sampling columns.
        self.device: dict[str, torch.Tensor] = {**self._arrays.device, **self._pages.device}
        self.needs = SamplingNeeds.NOTHING
        self.max_logprobs = -1  # of the rows that ask for some; -1: none does
        self.last_step = -1
        self._groups_rows = groups_rows
        self.has_groups = False  # of rows that begin with the same pages
        self.clear()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def request_rows(self) -> np.ndarray:
        """The request row of each row, int64; do not change it."""
        return self._rows

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, those of the steps on the stream included: int32."""
        return self._arrays.host["kv_len"][: len(self._rows)]

    def columns(self, num_rows: int) -> SamplingColumns:
        """The sampling columns of the first rows."""
        tensors = self._arrays.device
        return SamplingColumns(
            {name: tensors[name][:num_rows] for name in COLUMNS}, tensors["request_rows"][:num_rows]
        )

    def common_tables(self, num_rows: int) -> CommonTables:
        """Which of the first rows read pages together; only where the batch groups its rows."""
        tokens, rows, ends = (self.device[name] for name in CommonTables._fields)
        return CommonTables(tokens[:num_rows], rows[:num_rows], ends)

    def clear(self) -> None:
        """No rows, on both sides."""
        self._rows = np.empty(0, dtype=np.int64)
        self.last_step = -1
        self._rebuild()
        self._upload()

    def latest_sample(self, joined: tuple[int, ...]) -> int:
        """The latest step whose tokens the next step of this batch needs.

        Also of one without drafts that ends them, whose sequences are no rows any more: its tokens
        find their request rows in this batch.
        """
        latest = self.last_step
        for sequence_id in joined:
            latest = max(
                latest, int(self._request_table.sampled_in[self._request_table.row(sequence_id)])
            )
        return latest

    def apply(self, step: DecodeScheduled) -> list[Placed]:
        """Change the rows as `step` says, and advance every length by the token it computes.

        Returns where sequences with drafts lie in it, and their pages; empty: it has none.
        """
        if step.verified:
            return self._show_drafts(step)
        if step.left or step.joined:
            self._regroup(step)
            self._upload()
        elif step.page_rows:
            self._add_pages(step)
            self._upload_pages()
        self._arrays.host["kv_len"][: len(self._rows)] += 1
        self.last_step = step.step
        return []

    def catch_up(self) -> None:
        """Behind a step that was no graph: the device's lengths have not advanced by themselves."""
        self._arrays.upload()

    def _show_drafts(self, step: DecodeScheduled) -> list[Placed]:
        """Lay out the rows of `step.verified` instead of the batch, all of which has left.

        The first row of a sequence has its request row, so that what a step without drafts samples
        is its last token. The others have rows of their own, which nothing else reads.
        """
        assert len(step.left) == len(self._rows), "a step with drafts has no other rows"
        self._rows = np.empty(0, dtype=np.int64)
        self.last_step = step.step
        self._rebuild()
        host, pages = self._arrays.host, self._pages.host["pages"]
        num_pages = 1
        placed = self._request_table.place_drafts(step.verified, step.step)
        for seq, _ in placed:
            rows = slice(seq.query_start, seq.query_start + seq.query_len)
            places = np.arange(rows.start, rows.stop)
            host["request_rows"][rows] = self._unused_request_row + 1 + places
            host["request_rows"][rows.start] = seq.sequence_id
            host["active"][rows] = 1
            host["kv_len"][rows] = seq.num_computed + places - rows.start
            pages[rows] = self._request_table.pages[seq.sequence_id]
            num_pages = max(num_pages, int(self._request_table.num_pages[seq.sequence_id]))
        self._upload(num_pages)
        return placed

    def _upload(self, num_pages: int = 1) -> None:
        """Make the device's side equal to the host's, as far as it is read.

        `num_pages`: of rows that are not the batch's, at most.
        """
        self._arrays.upload()
        self._upload_pages(num_pages)

    def _upload_pages(self, num_pages: int = 1) -> None:
        """Of the device's side only the page tables.

        The page table of a context of 128k tokens has 8,192 columns: 8 MB for 256 rows.
        """
        host, device = self._pages.host["pages"], self._pages.device["pages"]
        if host.nbytes <= _WHOLE_TABLE_BYTES:
            self._pages.upload()
            return
        used = int(self._request_table.num_pages[self._rows].max(initial=num_pages))
        device[:, :used].copy_(self._stream.upload(np.ascontiguousarray(host[:, :used])))

    def _regroup(self, step: DecodeScheduled) -> None:
        table, rows = self._request_table, self._rows
        # The table is behind the rows while they advance; settle it before they change. Not for
        # the rows that leave: their request rows may have a new owner, or a new beginning, already.
        kept = np.delete(np.arange(len(rows)), step.left)
        lengths, rows = self._arrays.host["kv_len"][kept], rows[kept]
        table.num_computed[rows] = lengths
        table.sampled_in[rows] = self.last_step
        joined = [table.row(sequence_id) for sequence_id in step.joined]
        rows = np.concatenate((rows, np.array(joined, dtype=np.int64)))
        assert len(rows) == step.num_rows, f"{len(rows)} rows, the head has {step.num_rows}"
        self._rows = rows
        if step.page_rows:
            table.add_a_page_each(rows[list(step.page_rows)], step.new_pages)
        self._rebuild()

    def _add_pages(self, step: DecodeScheduled) -> None:
        rows = list(step.page_rows)
        places = self._request_table.add_a_page_each(self._rows[rows], step.new_pages)
        self._pages.host["pages"][rows, places] = step.new_pages

    def _rebuild(self) -> None:
        table, rows, host = self._request_table, self._rows, self._arrays.host
        num_rows = len(rows)
        host["request_rows"][:num_rows] = rows
        host["request_rows"][num_rows:] = self._unused_request_row
        host["active"][:num_rows] = 1
        host["active"][num_rows:] = 0
        host["kv_len"][:num_rows] = table.num_computed[rows]
        host["kv_len"][num_rows:] = 0
        pages = self._pages.host["pages"]
        pages[:num_rows] = table.pages[rows]
        pages[num_rows:] = self._unused_page
        for name, column in table.columns.items():
            host[name][:num_rows] = column[rows]
            host[name][num_rows:] = self._neutral[name]
        if self._groups_rows:
            lengths, page_size = host["kv_len"][:num_rows], table.page_size
            self.has_groups = fill_tables(host, pages[:num_rows], lengths, page_size)
        self.needs = table.needs_of(rows)
        asked = table.num_logprobs[rows]
        self.max_logprobs = int(asked.max()) if num_rows else -1


def _fields(
    rows: int, request_table: RequestTable, groups_rows: bool
) -> dict[str, tuple[tuple[int, ...], type]]:
    """What a batch holds of each row beside its pages, as `PackedArrays.allocate` takes it."""
    columns = sorted(request_table.columns.items(), key=lambda entry: -entry[1].itemsize)
    return {
        "request_rows": ((rows,), np.int64),
        **{name: ((rows,), column.dtype.type) for name, column in columns},
        "active": ((rows,), np.int32),
        "kv_len": ((rows,), np.int32),
        **(table_fields(rows) if groups_rows else {}),
    }
