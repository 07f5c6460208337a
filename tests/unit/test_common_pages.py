"""Which rows of a decode step read pages together."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mpipipe.kv_cache.common_pages import CommonPages, common_pages

Rows = list[tuple[int, ...]]


def found_in(rows: Rows) -> list[CommonPages]:
    """In rows of so many whole pages, behind which each has one more, padded as in a layout."""
    table = np.zeros((len(rows), max(map(len, rows), default=0) + 1), dtype=np.int64)
    for row, pages in enumerate(rows):
        table[row, : len(pages)] = pages
    return common_pages(table, np.array([len(pages) for pages in rows], dtype=np.int64))


def num_common(rows: Rows) -> int:
    whole = min(map(len, rows))
    return max(end for end in range(whole + 1) if len({row[:end] for row in rows}) == 1)


def num_spared(groups: list[CommonPages]) -> int:
    return sum((len(group.rows) - 1) * group.num_pages for group in groups)


def num_spared_at(rows: Rows, depth: int) -> int:
    """By groups of the rows whose first `depth` pages are equal."""
    beginnings = [row[:depth] for row in rows if len(row) >= depth]
    return (len(beginnings) - len(set(beginnings))) * depth


def test_rows_without_common_pages_make_no_group() -> None:
    assert found_in([(1, 2), (3, 4), (5,), ()]) == []
    assert found_in([]) == []
    assert found_in([(), ()]) == []


def test_what_pads_a_row_is_no_page_that_it_has() -> None:
    """Page 0 is the first of another sequence."""
    assert found_in([(0, 0, 3), (), (0,)]) == [CommonPages((0, 2), 1)]


def test_neighbours_need_not_stand_beside_each_other() -> None:
    rows = [(1, 2, 3), (7, 8, 9), (1, 2, 4), (7, 8, 9, 5), (6, 2)]
    assert found_in(rows) == [CommonPages((0, 2), 2), CommonPages((1, 3), 3)]


def test_parts_that_share_more_than_all_of_them_are_groups_of_their_own() -> None:
    first, second = tuple(range(10, 20)), tuple(range(20, 30))
    rows = [(1, *first, 2), (1, *second, 3), (1, *first, 4), (1, *second, 5)]
    assert found_in(rows) == [CommonPages((0, 2), 11), CommonPages((1, 3), 11)]
    rows = [(*first, 1, 2), (*first, 1, 3), (*first, 4), (*first, 5)]
    assert found_in(rows) == [CommonPages((0, 1, 2, 3), 10)]


def test_a_chain_of_beginnings_ends_somewhere() -> None:
    """Each row begins as all shorter ones do."""
    rows = [tuple(range(1, length + 1)) for length in range(2000)]
    groups = found_in(rows)
    assert num_spared(groups) > 0
    members = [row for group in groups for row in group.rows]
    assert len(set(members)) == len(members)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 1), max_size=6).map(tuple), max_size=8))
def test_groups_are_true_and_spare_as_much_as_those_of_any_depth(rows: Rows) -> None:
    groups = found_in(rows)
    members = [row for group in groups for row in group.rows]
    assert len(set(members)) == len(members)
    for group in groups:
        assert len(group.rows) > 1
        assert group.num_pages == num_common([rows[row] for row in group.rows]) > 0
    assert num_spared(groups) >= max(num_spared_at(rows, depth) for depth in range(7))
