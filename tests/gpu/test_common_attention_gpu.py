"""A large group of rows gets from common pages what each of its rows gets alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpipipe.kv_cache.common_tables import CommonTables, fill_tables, table_fields
from mpipipe.models.layer_options import AttentionOptions

pytestmark = pytest.mark.gpu

PAGE_SIZE = 16
NUM_ROWS = 70  # no multiple of the rows of a tile
NUM_COMMON_PAGES = 64


def compare(device: torch.device, dtype: torch.dtype, head_dim: int, num_common: int) -> None:
    """32 query heads, 8 KV heads; each row has one to forty tokens of its own."""
    from mpipipe.models.kernels.common_attention import attend_common
    from mpipipe.models.kernels.decode_attention import paged_decode_attention

    draw = torch.Generator().manual_seed(0)
    own_pages = 3
    num_pages = num_common + NUM_ROWS * own_pages
    shape = (num_pages, PAGE_SIZE, 8, head_dim)
    keys, values = (torch.randn(shape, generator=draw).to(device, dtype) for _ in range(2))
    query = torch.randn(NUM_ROWS, 32, head_dim, generator=draw).to(device, dtype)
    common = np.arange(num_common)
    own = num_common + np.arange(NUM_ROWS * own_pages).reshape(NUM_ROWS, own_pages)
    table = np.concatenate([np.tile(common, (NUM_ROWS, 1)), own], axis=1).astype(np.int32)
    lengths = num_common * PAGE_SIZE + 1 + torch.randint(40, (NUM_ROWS,), generator=draw).numpy()
    fields = table_fields(NUM_ROWS)
    host: dict[str, np.ndarray] = {
        name: np.zeros(size, kind) for name, (size, kind) in fields.items()
    }
    assert fill_tables(host, table, lengths - 1, PAGE_SIZE)
    assert host["common_tokens"].tolist() == [num_common * PAGE_SIZE] * NUM_ROWS
    tables = CommonTables(*(torch.from_numpy(host[n]).to(device) for n in CommonTables._fields))
    held = (query, keys, values, torch.from_numpy(table).to(device))
    lens = torch.from_numpy(lengths).int().to(device)
    options, max_kv_len = AttentionOptions(head_dim**-0.5), (num_common + own_pages) * PAGE_SIZE
    alone = paged_decode_attention(*held, lens, max_kv_len=max_kv_len, options=options)
    for _ in range(2):  # the counters are back at zero afterwards
        parts = attend_common(*held, tables, max_kv_len=max_kv_len, options=options)
        together = paged_decode_attention(
            *held, lens, max_kv_len=max_kv_len, options=options, common=parts
        )
        torch.testing.assert_close(together, alone, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("head_dim", [64, 100, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_a_large_group_get_what_each_gets_alone(dtype: torch.dtype, head_dim: int) -> None:
    compare(torch.device("cuda"), dtype, head_dim, NUM_COMMON_PAGES)
