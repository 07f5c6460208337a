"""A weight that stays as it lies is multiplied as `F.linear` does it, for any number of rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from mpipipe.models.row_major_linear import RowMajorLinear, as_it_lies


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 12, 13, 64])
@pytest.mark.parametrize(("num_out", "num_in"), [(5, 7), (1000, 300), (17, 1 << 18)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_computes_what_a_plain_linear_does(
    num_rows: int, num_out: int, num_in: int, has_bias: bool
) -> None:
    torch.manual_seed(0)
    weight_OI = torch.randn(num_out, num_in)
    bias_O = torch.randn(num_out) if has_bias else None
    rows_1TI, residual_1TO = torch.randn(1, num_rows, num_in), torch.randn(1, num_rows, num_out)
    found = RowMajorLinear(weight_OI, bias_O)
    exact_O = None if bias_O is None else bias_O.double()
    expected = linear(rows_1TI.double(), weight_OI.double(), exact_O)
    torch.testing.assert_close(found(rows_1TI).double(), expected, rtol=1e-4, atol=1e-2)
    both = found.plus(rows_1TI, residual_1TO).double()
    torch.testing.assert_close(both, expected + residual_1TO, rtol=1e-4, atol=1e-2)


def test_what_comes_into_the_weights_memory_is_seen() -> None:
    memory = torch.randn(40)
    product, rows = RowMajorLinear(memory.view(5, 8), None), torch.randn(3, 8)
    memory.copy_(torch.randn(40))
    torch.testing.assert_close(product(rows), linear(rows, memory.view(5, 8)))
    assert not list(product.parameters())


def test_only_plain_linears_get_that_form() -> None:
    odd = nn.Linear(4, 4, dtype=torch.float64)
    assert as_it_lies(odd) is odd
    plain = nn.Linear(4, 4)
    found = as_it_lies(plain)
    assert isinstance(found, RowMajorLinear)
    assert found._weight_OI.data_ptr() == plain.weight.data_ptr()
