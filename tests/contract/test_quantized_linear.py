"""Products of weights in 8 bits: against the same in float64."""

from __future__ import annotations

import pytest
import torch

from mpipipe.models.operations import torch_operations
from mpipipe.models.quantized_linear import quantize_rows_fp8
from mpipipe.weights.quantize import quantize_weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def error_of(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_an_int8_product_is_the_dequantised_one(dtype: torch.dtype, biased: bool) -> None:
    # Unscaled, sums of these would be far beyond float16's 65,504.
    weight_OI = torch.randint(-127, 128, (24, 512), dtype=torch.int8)
    scale_O = drawn(24).abs() * 1e-3
    rows_TI, bias_O = (50 * drawn(5, 512)).to(dtype), drawn(24).to(dtype) if biased else None
    found_TO = torch_operations().linear_int8(rows_TI, weight_OI, scale_O, bias_O)
    exact_TO = rows_TI.double() @ (weight_OI.double() * scale_O.double()[:, None]).T
    if bias_O is not None:
        exact_TO = exact_TO + bias_O.double()
    assert found_TO.dtype == dtype
    assert error_of(found_TO, exact_TO) <= ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_an_fp8_product_quantises_each_row_alone(dtype: torch.dtype, biased: bool) -> None:
    weight_OI = (100 * drawn(24, 512)).to(torch.float8_e4m3fn)
    scale_O = drawn(24).abs() * 1e-3
    # Rows of very different sizes: one scale for all would lose the small ones.
    sizes_T1 = torch.tensor([[1e-3], [1.0], [50.0], [0.0], [1.0]])
    rows_TI = (sizes_T1 * drawn(5, 512)).to(dtype)
    bias_O = drawn(24).to(dtype) if biased else None
    found_TO = torch_operations().linear_fp8(rows_TI, weight_OI, scale_O, bias_O)
    narrow_TI, scale_T = quantize_rows_fp8(rows_TI)
    exact_TO = narrow_TI.double() @ weight_OI.double().T
    exact_TO = exact_TO * scale_T.double()[:, None] * scale_O.double()
    if bias_O is not None:
        exact_TO = exact_TO + bias_O.double()
    assert found_TO.dtype == dtype
    assert error_of(found_TO, exact_TO) <= ROUNDING[dtype]
    # e4m3 keeps three bits behind the leading one: 2^-4 at most, half of that on average.
    restored_TI = narrow_TI.float() * scale_T[:, None]
    for row in (0, 1, 2, 4):
        assert error_of(restored_TI[row], rows_TI[row].double()) < 0.04
    alone_1O = torch_operations().linear_fp8(rows_TI[:1], weight_OI, scale_O, bias_O)
    assert error_of(alone_1O, found_TO[:1].double()) <= ROUNDING[dtype]


def test_a_row_of_zeros_stays_one() -> None:
    narrow_TI, scale_T = quantize_rows_fp8(torch.zeros(2, 16))
    assert torch.equal(narrow_TI.float(), torch.zeros(2, 16))
    assert bool((scale_T > 0).all())


@pytest.mark.parametrize("narrow", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_out", [1, 300, 701])  # 300 rows of 512 weights are more than a block
def test_a_weight_is_quantised_block_by_block_and_stays_as_it_was(
    narrow: torch.dtype, dtype: torch.dtype, num_out: int
) -> None:
    weight_OI = drawn(num_out, 512).to(dtype)
    before_OI = weight_OI.clone()
    narrow_OI, scale_O = torch.empty(num_out, 512, dtype=narrow), torch.empty(num_out)
    quantize_weight(weight_OI, narrow_OI, scale_O)
    largest = 127.0 if narrow == torch.int8 else 448.0
    expected_O = weight_OI.float().abs().amax(dim=1) / largest
    assert torch.equal(scale_O, expected_O)
    exact_OI = weight_OI.float() / expected_O[:, None]
    if narrow == torch.int8:
        exact_OI = exact_OI.round()
    assert torch.equal(narrow_OI.float(), exact_OI.to(narrow).float())
    assert torch.equal(weight_OI, before_OI)
