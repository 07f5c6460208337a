"""Packs weights in float16, and gives back the part of their memory that nothing uses.

FBGEMM lays a weight [O, I] out in blocks of 512 inputs and 16 outputs. It takes memory for whole
blocks and fills it with zeros, but stores the last blocks of inputs as short as they are: behind
them is a stretch of zeros that no product reads. With 576 inputs (SmolLM2) that is 44 % of the
matrix, with 896 (Qwen2-0.5B) 13 %, with a multiple of 512 nothing.

Nothing tells where the matrix is. So memory of its size is taken and freed just before, which the
C library does by a mapping of its own (`own_mappings`), and the matrix is looked for in the same
place. It is given back only if the first and last weights of every block of inputs are where this
layout has them, and only where all is zero: pages that are given back read as zeros again, so a
wrong guess would change no number. Elsewhere (another C library or layout) nothing is done.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["half_packed", "own_mappings"]

_BLOCK_INPUTS = 512
_BLOCK_OUTPUTS = 16
_ALIGNMENT = 64
_READ_AHEAD_BYTES = 1024  # that FBGEMM takes more, for kernels that read ahead
_ITEM_BYTES = 2
_OWN_BYTES = 1 << 20  # memory of that size and more is a mapping of its own
# glibc's own limit of what grows by itself, until it is set.
_USUAL_OWN_BYTES, _USUAL_TRIM_BYTES = 32 << 20, 64 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_MADV_DONTNEED = 4


@contextmanager
def own_mappings() -> Iterator[None]:
    """Large memory comes straight from the system, and goes there when it is freed.

    Elsewhere it would be cut from heaps, which cannot shrink while any piece behind is in use.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _OWN_BYTES)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _USUAL_OWN_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _USUAL_TRIM_BYTES)


def half_packed(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.ScriptObject:
    """A float32 weight that float16 holds exactly, as FBGEMM packs it."""
    layout = _Layout(*weight_OI.shape)
    place = _next_place(layout) if layout.num_bytes - layout.used_bytes >= _OWN_BYTES / 8 else None
    packed: torch.ScriptObject = torch.ops.quantized.linear_prepack_fp16(weight_OI, bias_O)
    if place is not None and _is_at(place, layout, weight_OI):
        _give_back_zeros(place + layout.used_bytes, place + layout.num_bytes)
    return packed


@dataclass(frozen=True, slots=True)
class _Layout:
    """Of a packed weight [outputs, inputs]."""

    num_outputs: int
    num_inputs: int

    @property
    def _width(self) -> int:
        """Outputs, in whole blocks."""
        return -(-self.num_outputs // _BLOCK_OUTPUTS) * _BLOCK_OUTPUTS

    @property
    def num_bytes(self) -> int:
        """That are taken."""
        blocks = -(-self.num_inputs // _BLOCK_INPUTS)
        return blocks * _BLOCK_INPUTS * self._width * _ITEM_BYTES

    @property
    def used_bytes(self) -> int:
        """That hold weights: they come first."""
        return self.num_inputs * self._width * _ITEM_BYTES

    def block_bounds(self) -> Iterator[tuple[int, int]]:
        """The bytes of each block of inputs, over all outputs."""
        for first in range(0, self.num_inputs, _BLOCK_INPUTS):
            last = min(first + _BLOCK_INPUTS, self.num_inputs)
            yield first * self._width * _ITEM_BYTES, last * self._width * _ITEM_BYTES


def _next_place(layout: _Layout) -> int | None:
    """Where memory for a packed weight will be, most likely."""
    if layout.num_bytes < _OWN_BYTES:
        return None
    library, found = ctypes.CDLL(None), ctypes.c_void_p()
    size = ctypes.c_size_t(layout.num_bytes + _READ_AHEAD_BYTES)
    if library.posix_memalign(ctypes.byref(found), ctypes.c_size_t(_ALIGNMENT), size):
        return None
    library.free(found)
    return found.value


def _is_at(place: int, layout: _Layout, weight_OI: torch.Tensor) -> bool:
    """Whether the packed `weight_OI` lies there: its corners do. Reads what need not be mapped."""
    if layout.num_outputs % _BLOCK_OUTPUTS:
        return False
    corner = _BLOCK_OUTPUTS * _ITEM_BYTES
    first_I, last_I = weight_OI[:_BLOCK_OUTPUTS].T, weight_OI[-_BLOCK_OUTPUTS:].T
    try:
        memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return all(
            os.pread(memory, corner, place + begin) == _half(first_I[number * _BLOCK_INPUTS])
            and os.pread(memory, corner, place + end - corner)
            == _half(last_I[min((number + 1) * _BLOCK_INPUTS, layout.num_inputs) - 1])
            for number, (begin, end) in enumerate(layout.block_bounds())
        )
    except OSError:  # nothing is mapped there
        return False
    finally:
        os.close(memory)


def _half(row: torch.Tensor) -> bytes:
    return bytes(row.half().contiguous().view(torch.uint8).tolist())


def _give_back_zeros(begin: int, end: int) -> None:
    """The whole pages between two addresses, if all of them are zero."""
    page = mmap.PAGESIZE
    begin, end = -(-begin // page) * page, end // page * page
    if end <= begin:
        return
    content = (ctypes.c_uint8 * (end - begin)).from_address(begin)
    if not bool(torch.frombuffer(content, dtype=torch.int64).any()):
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED
        )
