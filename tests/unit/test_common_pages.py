"""Which rows of a decode step read pages together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpipipe.kv_cache import common_pages as module
from mpipipe.kv_cache.common_pages import CommonPages, CommonPagesMemory, common_pages

Rows = Sequence[tuple[int, ...]]


def tables(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Rows of so many whole pages, behind which each has one more, padded as in a layout."""
    table = np.zeros((len(rows), max(map(len, rows), default=0) + 1), dtype=np.int64)
    for row, pages in enumerate(rows):
        table[row, : len(pages)] = pages
    return table, np.array([len(pages) for pages in rows], dtype=np.int64)


def found_in(rows: Rows, min_spared_pages: int = 1) -> list[CommonPages]:
    return common_pages(*tables(rows), min_spared_pages)


def most_spared(rows: Rows, min_spared_pages: int) -> int:
    """The oracle: every way to put rows into disjoint groups."""

    def most(left: tuple[int, ...]) -> int:
        if not left:
            return 0
        first, others = left[0], left[1:]
        best = most(others)
        for size in range(1, len(others) + 1):
            for chosen in itertools.combinations(others, size):
                spared = size * num_common([rows[first], *(rows[row] for row in chosen)])
                if spared >= min_spared_pages:
                    rest = tuple(row for row in others if row not in chosen)
                    best = max(best, spared + most(rest))
        return best

    return most(tuple(range(len(rows))))


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


def test_a_long_chain_of_beginnings_is_searched_whole() -> None:
    """Each row begins as all shorter ones do."""
    rows = [tuple(range(1, length + 1)) for length in range(2000)]
    groups = found_in(rows)
    # The longest ones in pairs would spare fewer: a group of half of them is the best single one.
    assert num_spared(groups) >= 999 * 1000
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


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 1), max_size=5).map(tuple), max_size=6), st.integers(1, 12))
def test_no_other_groups_that_pass_the_minimum_spare_more(rows: Rows, least: int) -> None:
    groups = found_in(rows, least)
    members = [row for group in groups for row in group.rows]
    assert len(set(members)) == len(members)
    for group in groups:
        assert 0 < group.num_pages <= num_common([rows[row] for row in group.rows])
        assert (len(group.rows) - 1) * group.num_pages >= least
    assert num_spared(groups) == most_spared(rows, least)


def test_parts_below_the_minimum_are_read_with_all_that_begin_alike() -> None:
    """Pairs that spare 11 pages each, or all of them with one page in common less."""
    first, second = tuple(range(10, 14)), tuple(range(20, 24))
    common = (1, 2, 3, 4, 5, 6)
    rows = [(*common, *first), (*common, *second), (*common, *first), (*common, *second)]
    assert found_in(rows, 10) == [CommonPages((0, 2), 10), CommonPages((1, 3), 10)]
    assert found_in(rows, 11) == [CommonPages((0, 1, 2, 3), 6)]
    assert found_in(rows, 19) == []


def test_a_row_helps_others_to_the_minimum() -> None:
    """All of the deeper part would spare more there, but one of them lets two others share."""
    deep = (1, 2, 3, 4)
    rows = [(1, 2, 9), (1, 2, 8), deep, deep, deep]
    shallow, deeper = found_in(rows, 4)
    assert (shallow.rows[:2], len(shallow.rows), shallow.num_pages) == ((0, 1), 3, 2)
    assert (len(deeper.rows), deeper.num_pages) == (2, 4)


class Counting:
    """Counts the searches."""

    def __init__(self, search: Any) -> None:
        self.num_calls = 0
        self._search = search

    def __call__(self, *arguments: Any) -> Any:
        self.num_calls += 1
        return self._search(*arguments)


def test_steps_in_which_no_row_changes_search_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    search = Counting(module._search)
    monkeypatch.setattr(module, "_search", search)
    memory = CommonPagesMemory()
    slots = [
        [(1, 2, 3, 40 + row) for row in range(4)],
        [(1, 2, 3, 50 + row) for row in range(4)],
    ]
    for grown in range(20):  # each row gets pages of its own
        for number, rows in enumerate(slots):
            longer = [
                (*row, *range(1000 * number + 100 * row[3], 1000 * number + 100 * row[3] + grown))
                for row in rows
            ]
            assert memory.find(*tables(longer), 1) == found_in(rows)
    expected = search.num_calls - 40  # those of `found_in`
    assert expected <= 2 * 2 + 1  # narrow tables of the first steps, and what decides
    one_left = slots[0][1:]
    assert memory.find(*tables(one_left), 1) == [CommonPages((0, 1, 2), 3)]


def test_wide_tables_are_kept_in_few_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    search = Counting(module._search)
    monkeypatch.setattr(module, "_search", search)
    memory = CommonPagesMemory()
    slots = [[(1, 2, 3), (1, 2, 4)], [(1, 2, 5), (1, 2, 6)]]
    for _ in range(3):
        for rows in slots:
            memory.find(*tables(rows), 1)
    several = search.num_calls
    monkeypatch.setattr(module, "_MAX_KEPT_BYTES", 2 * 3 * 8)  # of one table of two rows
    for _ in range(3):
        for rows in ([(1, 2, 7), (1, 2, 8)], [(1, 2, 7), (1, 2, 9)]):
            memory.find(*tables(rows), 1)
    assert several <= 3
    assert search.num_calls == several + 6, "each takes the place of the other"


def test_nothing_is_looked_up_where_no_row_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    search = Counting(module._search)
    monkeypatch.setattr(module, "_search", search)
    assert CommonPagesMemory().find(*tables([(1, 2), (3, 4), ()]), 1) == []
    assert CommonPagesMemory().find(*tables([]), 1) == []
    assert search.num_calls == 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.lists(st.integers(0, 2), max_size=5).map(tuple), max_size=5), max_size=8)
)
def test_what_was_kept_is_what_would_be_found(steps: list[Rows]) -> None:
    memory = CommonPagesMemory()
    for rows in [*steps, *reversed(steps)]:
        for least in (1, 3):
            assert memory.find(*tables(rows), least) == found_in(rows, least)
