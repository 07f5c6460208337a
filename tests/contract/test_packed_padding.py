"""Packed weights hold no more memory than their weights take, and multiply as before."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import pytest
import torch

from mpipipe.models import packed_padding
from mpipipe.models.packed_padding import half_packed, own_mappings

MIB = 2**20

pytestmark = pytest.mark.skipif(
    torch.backends.quantized.engine not in {"x86", "fbgemm"}, reason="packs with FBGEMM"
)


def resident_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def made_weight(num_outputs: int, num_inputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_outputs, num_inputs, generator=generator).half().float()


def assert_multiplies(packed: torch.ScriptObject, weight_OI: torch.Tensor) -> None:
    rows = torch.randn(3, weight_OI.shape[1], generator=torch.Generator().manual_seed(1))
    found = torch.ops.quantized.linear_dynamic_fp16(rows, packed)
    torch.testing.assert_close(found, rows @ weight_OI.T, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not this C library")
def test_the_padding_of_packed_weights_is_given_back() -> None:
    # 576 inputs are two blocks of 512: 32 MiB are taken, of which 18 MiB hold weights.
    weight_OI = made_weight(16_384, 576)
    gc.collect()
    with own_mappings():
        before = resident_bytes()
        packed = half_packed(weight_OI, None)
        held = resident_bytes() - before
    assert 18 * MIB <= held < 20 * MIB
    assert_multiplies(packed, weight_OI)


@pytest.mark.parametrize("shape", [(4096, 576), (960, 1100), (1000, 576), (64, 64), (2048, 1024)])
def test_products_are_those_of_the_weight(shape: tuple[int, int]) -> None:
    weight_OI = made_weight(*shape)
    with own_mappings():
        assert_multiplies(half_packed(weight_OI, None), weight_OI)


def test_what_is_elsewhere_than_expected_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a place that is not mapped, and of one that holds something else, nothing is given."""
    other = torch.zeros(8 * MIB, dtype=torch.uint8)
    given: list[int] = []
    monkeypatch.setattr(packed_padding, "_give_back_zeros", lambda *bounds: given.extend(bounds))
    weight_OI = made_weight(4096, 576)
    for place in (64, other.data_ptr()):
        monkeypatch.setattr(packed_padding, "_next_place", lambda _, place=place: place)
        assert_multiplies(half_packed(weight_OI, None), weight_OI)
    assert given == []


def test_only_zeros_are_given_back() -> None:
    held = torch.zeros(4 * MIB, dtype=torch.uint8)
    held[2 * MIB] = 1
    packed_padding._give_back_zeros(held.data_ptr(), held.data_ptr() + held.numel())
    assert int(held.sum()) == 1
