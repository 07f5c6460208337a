"""Which rows of a decode step begin with the same pages, so that these can be read once for all.

Pages are shared by sequences that begin alike (`scheduler.shared_prefixes`), so equal entries of
page tables are all there is to look for. No tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["CommonPages", "common_pages"]

_MAX_DEPTH = 16  # of branches below each other: longer chains are looked at no further


@dataclass(frozen=True, slots=True)
class CommonPages:
    """Rows of a step, at least two, and how many leading pages they have in common."""

    rows: tuple[int, ...]
    num_pages: int


def common_pages(page_table_BP: np.ndarray, num_whole_B: np.ndarray) -> list[CommonPages]:
    """Groups of rows that spare reads when each reads its common pages once; pairwise disjoint.

    Where some rows of a group have more pages in common than all of it, they are a group of their
    own if that spares more. So no groups by a fixed number of pages spare more, as long as chains
    of beginnings within beginnings are not too long; the best ones there are would take longer.

    Args:
        page_table_BP: pages of each row.
        num_whole_B: leading pages of each row that may be shared: those that hold none of the
            tokens that the row must read alone.
    """
    tables = page_table_BP, num_whole_B
    branches = _branches(np.arange(len(num_whole_B)), 0, tables)
    return [group for branch in branches for group in _groups(branch, tables, _MAX_DEPTH)]


def _branches(
    rows: np.ndarray, depth: int, tables: tuple[np.ndarray, np.ndarray]
) -> list[np.ndarray]:
    """The rows of each page that two or more of `rows` have behind the first `depth` ones."""
    page_table_BP, num_whole_B = tables
    rows = rows[num_whole_B[rows] > depth]
    pages = page_table_BP[rows, depth].tolist() if len(rows) else []
    if len(set(pages)) == len(pages):  # nothing is shared: the common case
        return []
    branches: dict[int, list[int]] = {}
    for row, page in zip(rows.tolist(), pages, strict=True):
        branches.setdefault(page, []).append(row)
    return [np.array(branch) for branch in branches.values() if len(branch) > 1]


def _groups(
    rows: np.ndarray, tables: tuple[np.ndarray, np.ndarray], levels: int
) -> list[CommonPages]:
    """The best groups of a branch: all of it as far as it is common, or parts that share more."""
    page_table_BP, num_whole_B = tables
    least = int(num_whole_B[rows].min())
    differs_P = (page_table_BP[rows, :least] != page_table_BP[rows[0], :least]).any(axis=0)
    depth = int(differs_P.argmax()) if differs_P.any() else least
    branches = _branches(rows, depth, tables) if levels else []
    parts = [(branch.tolist(), _groups(branch, tables, levels - 1)) for branch in branches]
    better = [part for part in parts if _num_spared(part[1]) > len(part[0]) * depth]
    return max((_with_rest(rows, depth, chosen) for chosen in (better, parts)), key=_num_spared)


def _with_rest(
    rows: np.ndarray, depth: int, parts: list[tuple[list[int], list[CommonPages]]]
) -> list[CommonPages]:
    """The groups of `parts`, and one of the rows that are in none of them."""
    rest = set(rows.tolist()).difference(*(branch for branch, _ in parts))
    groups = [group for _, found in parts for group in found]
    if len(rest) > 1:
        groups.append(CommonPages(tuple(sorted(rest)), depth))
    return groups


def _num_spared(groups: list[CommonPages]) -> int:
    """Pages that need not be read when the rows of each group read their common ones together."""
    return sum((len(group.rows) - 1) * group.num_pages for group in groups)
