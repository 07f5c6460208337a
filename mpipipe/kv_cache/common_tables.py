"""Tables of the rows of a decode step that read common pages together, for kernels on a GPU.

They have fixed shapes and addresses, so a CUDA graph may hold the step. They say the same until the
rows of the batch change: a page that is whole stays whole while its sequences grow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mpipipe.kv_cache.common_pages import common_pages
from mpipipe.planning.padding import MIN_SPARED_TOKENS_GPU

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

__all__ = ["MAX_GROUPS", "CommonTables", "fill_tables", "table_fields"]

MAX_GROUPS = 32  # of a step; those that spare least read alone


class CommonTables(NamedTuple):
    """Groups of rows, int32. Names of the fields are those of `table_fields`."""

    common_tokens: torch.Tensor  # [rows]: that its group reads for each row; 0: it reads alone
    common_rows: torch.Tensor  # [rows]: the rows of the groups, one group behind the other
    # [MAX_GROUPS]: where each group ends in `common_rows`; one without rows ends where it begins.
    common_ends: torch.Tensor


def table_fields(max_rows: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shapes and types of the tables of a batch of so many rows."""
    rows = ((max_rows,), np.int32)
    return {"common_tokens": rows, "common_rows": rows, "common_ends": ((MAX_GROUPS,), np.int32)}


def fill_tables(
    tables: Mapping[str, np.ndarray],
    page_table_BP: np.ndarray,
    num_computed_B: np.ndarray,
    page_size: int,
) -> bool:
    """Write the groups of the first rows into `tables`; whether there are any.

    Args:
        tables: by the names of `table_fields`.
        page_table_BP: pages of each row.
        num_computed_B: tokens of each row before this step; the pages that they fill may be shared.
        page_size: tokens per page.
    """
    least = -(-MIN_SPARED_TOKENS_GPU // page_size)
    groups = common_pages(page_table_BP, num_computed_B // page_size, least)
    groups.sort(key=lambda group: -(len(group.rows) - 1) * group.num_pages)
    tokens, rows, ends = (tables[name] for name in CommonTables._fields)
    tokens[:] = 0
    end = 0
    for number, group in enumerate(groups[:MAX_GROUPS]):
        tokens[list(group.rows)] = group.num_pages * page_size
        rows[end : end + len(group.rows)] = group.rows
        end += len(group.rows)
        ends[number] = end
    ends[len(groups) :] = end
    return bool(groups)
