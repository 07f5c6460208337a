"""Which rows of a decode step begin with the same pages, so that these can be read once for all.

Pages are shared by sequences that begin alike (`scheduler.shared_prefixes`), so equal entries of
page tables are all there is to look for. No tensors.

Sorted rows that have pages in common are neighbours, and the runs of neighbours with the same
common pages are a tree. Of all disjoint groups of rows, each at a node of it, the search finds the
ones that spare most: by dynamic programming over how many rows of a node stay free for its
ancestors. That takes of the order of B² for B rows, so `CommonPagesMemory` keeps what was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["CommonPages", "CommonPagesMemory", "common_pages"]

_IMPOSSIBLE = -(1 << 60)
_MAX_KEPT = 64  # more than the slots of a pipeline
_MAX_KEPT_BYTES = 8 << 20  # of page tables in keys: 256 rows of 2,000 pages are 2 MB


@dataclass(frozen=True, slots=True)
class CommonPages:
    """Rows of a step, at least two, and how many leading pages they have in common."""

    rows: tuple[int, ...]
    num_pages: int


@dataclass(slots=True, eq=False)
class _Node:
    """A run of sorted rows that have `depth` pages in common; parts of it may have more."""

    depth: int
    leaves: list[int] = field(default_factory=list)  # rows that are in none of `parts`
    parts: list[_Node] = field(default_factory=list)
    # Each by how many rows stay free, for groups of ancestors: the pages that are spared.
    best_F: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    without_F: np.ndarray = field(
        default_factory=lambda: np.zeros(1, dtype=np.int64)
    )  # a group here
    joined: list[np.ndarray] = field(default_factory=list)  # in the first part, in the first two …


def common_pages(
    page_table_BP: np.ndarray, num_whole_B: np.ndarray, min_spared_pages: int = 1
) -> list[CommonPages]:
    """The groups of rows that spare most reads when each reads its common pages once; disjoint.

    Args:
        page_table_BP: pages of each row.
        num_whole_B: leading pages of each row that may be shared: those that hold none of the
            tokens that the row must read alone.
        min_spared_pages: reads that each group must spare; at least one.
    """
    return _search(page_table_BP, num_whole_B, min_spared_pages)[0]


class CommonPagesMemory:
    """`common_pages` of the latest steps: of a slot whose rows are the same, it is looked up.

    Pages behind the longest common beginning decide nothing, so growing sequences change nothing.
    Keys are the pages before that themselves: equal keys have equal groups.
    """

    def __init__(self) -> None:
        self._num_columns = 1  # of page tables, that decide on all groups kept
        self._kept: dict[tuple[object, ...], list[CommonPages]] = {}

    def find(
        self, page_table_BP: np.ndarray, num_whole_B: np.ndarray, min_spared_pages: int
    ) -> list[CommonPages]:
        """As `common_pages`."""
        if not _shares_first_page(page_table_BP, num_whole_B):
            return []
        found = self._kept.get(self._key(page_table_BP, num_whole_B, min_spared_pages))
        if found is not None:
            return found
        found, deepest = _search(page_table_BP, num_whole_B, min_spared_pages)
        if deepest >= self._num_columns:
            self._num_columns = deepest + 1
            self._kept.clear()
        key_bytes = page_table_BP[:, : self._num_columns].nbytes
        num_kept = max(1, min(_MAX_KEPT, _MAX_KEPT_BYTES // key_bytes))
        while len(self._kept) >= num_kept:
            del self._kept[next(iter(self._kept))]
        self._kept[self._key(page_table_BP, num_whole_B, min_spared_pages)] = found
        return found

    def _key(
        self, page_table_BP: np.ndarray, num_whole_B: np.ndarray, min_spared_pages: int
    ) -> tuple[object, ...]:
        deciding = page_table_BP[:, : self._num_columns]
        whole = np.minimum(num_whole_B, self._num_columns)
        return deciding.shape, deciding.tobytes(), whole.tobytes(), min_spared_pages


def _shares_first_page(page_table_BP: np.ndarray, num_whole_B: np.ndarray) -> bool:
    """False is the common case, and has to cost nothing."""
    if not page_table_BP.size:
        return False
    pages = page_table_BP[num_whole_B > 0, 0].tolist()
    return len(set(pages)) < len(pages)


def _search(
    page_table_BP: np.ndarray, num_whole_B: np.ndarray, min_spared_pages: int
) -> tuple[list[CommonPages], int]:
    """The groups, and how many pages any two rows have in common at most."""
    if not _shares_first_page(page_table_BP, num_whole_B):
        return [], 0
    order, num_common = _sorted_rows(page_table_BP, num_whole_B)
    groups: list[CommonPages] = []
    for nodes in _trees(order, num_common):  # each node behind its parts
        for node in nodes:
            _solve(node, min_spared_pages)
        groups += _chosen(nodes[-1], min_spared_pages)
    return sorted(groups, key=lambda group: group.rows), max(num_common)


def _sorted_rows(page_table_BP: np.ndarray, num_whole_B: np.ndarray) -> tuple[list[int], list[int]]:
    """Rows in an order in which those that begin alike are neighbours; pages common to each two."""
    whole = num_whole_B.tolist()
    order = sorted(range(len(whole)), key=lambda row: page_table_BP[row, : whole[row]].tobytes())
    sorted_BP = page_table_BP[order]
    differs_BP = sorted_BP[1:] != sorted_BP[:-1]
    first_B = np.where(differs_BP.any(axis=1), differs_BP.argmax(axis=1), differs_BP.shape[1])
    whole_B = num_whole_B[order]
    return order, np.minimum(first_B, np.minimum(whole_B[1:], whole_B[:-1])).tolist()


def _trees(order: Sequence[int], num_common: Sequence[int]) -> list[list[_Node]]:
    """The nodes of each tree, parts before the whole."""
    trees: list[list[_Node]] = [[]]
    path: list[_Node] = []  # from the root to the latest row
    for place, row in enumerate(order):
        before = num_common[place - 1] if place else 0
        after = num_common[place] if place < len(num_common) else 0
        if after > before:
            path.append(_Node(after, [row]))
            continue
        if before:
            path[-1].leaves.append(row)
        while path and path[-1].depth > after:
            node = path.pop()
            trees[-1].append(node)
            if path and path[-1].depth >= after:
                path[-1].parts.append(node)
            elif after:
                path.append(_Node(after, parts=[node]))
            else:
                trees.append([])
    return [nodes for nodes in trees if nodes]


def _solve(node: _Node, min_spared_pages: int) -> None:
    """What can be spared at and below a node whose parts are solved."""
    for part in node.parts:
        best_F = part.best_F
        node.joined.append(_joined(node.joined[-1], best_F) if node.joined else best_F)
    below_F = node.joined[-1] if node.joined else np.zeros(1, dtype=np.int64)
    free_leaves_F = np.full(len(node.leaves), _IMPOSSIBLE, dtype=np.int64)
    node.best_F = node.without_F = np.concatenate((free_leaves_F, below_F))
    # A group takes the rows that are free here, but for those that stay free for ancestors.
    least = _least_rows(node, min_spared_pages)
    num_grouped = len(node.without_F) - least
    if num_grouped <= 0:
        return
    places_F = np.arange(len(node.without_F)) * node.depth
    grouped_F = (node.without_F + places_F)[least:] - node.depth
    most_F = np.maximum.accumulate(grouped_F[::-1])[::-1]  # of so many rows, or of more
    node.best_F = node.without_F.copy()
    spared_F = node.best_F[:num_grouped]
    np.maximum(spared_F, most_F - places_F[:num_grouped], out=spared_F)


def _least_rows(node: _Node, min_spared_pages: int) -> int:
    """Of a group at `node`."""
    return -(-min_spared_pages // node.depth) + 1


def _joined(first_F: np.ndarray, second_F: np.ndarray) -> np.ndarray:
    """The most that two parts spare together, by the rows that are free in both."""
    joined_F = np.full(len(first_F) + len(second_F) - 1, _IMPOSSIBLE, dtype=np.int64)
    shorter_F, longer_F = sorted((first_F, second_F), key=len)
    for num_free, spared in enumerate(shorter_F.tolist()):
        if spared >= 0:
            span_F = joined_F[num_free : num_free + len(longer_F)]
            np.maximum(span_F, longer_F + spared, out=span_F)
    return joined_F


def _chosen(root: _Node, min_spared_pages: int) -> list[CommonPages]:
    """The groups by which most is spared below `root`: its sums, followed back to their parts."""
    members: list[list[int]] = [[]]  # of each group; first: rows that are read alone
    depths = [0]
    # Nodes, and for each of their free rows the group that it goes to.
    waiting = [(root, [0] * int(root.best_F.argmax()))]
    while waiting:
        node, labels = waiting.pop()
        num_free = len(labels)
        if node.best_F[num_free] > node.without_F[num_free]:
            first = num_free + _least_rows(node, min_spared_pages)
            spared_F = node.without_F[first:]
            num_before = first + int((spared_F + np.arange(len(spared_F)) * node.depth).argmax())
            labels = labels + [len(members)] * (num_before - num_free)
            members.append([])
            depths.append(node.depth)
        for row in node.leaves:
            members[labels.pop()].append(row)
        for number in range(len(node.parts) - 1, 0, -1):
            num_kept = _num_first(node.joined[number - 1], node.parts[number].best_F, len(labels))
            waiting.append((node.parts[number], labels[num_kept:]))
            labels = labels[:num_kept]
        waiting.extend((part, labels) for part in node.parts[:1])
    found = zip(members[1:], depths[1:], strict=True)
    return [CommonPages(tuple(sorted(rows)), depth) for rows, depth in found]


def _num_first(first_F: np.ndarray, second_F: np.ndarray, num_free: int) -> int:
    """Of the rows that are free in two parts where most is spared: those of the first."""
    least, most = max(0, num_free - len(second_F) + 1), min(num_free, len(first_F) - 1)
    places = np.arange(least, most + 1)
    return least + int((first_F[places] + second_F[num_free - places]).argmax())
