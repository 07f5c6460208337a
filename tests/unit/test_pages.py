from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpipipe.errors import OutOfPagesError
from mpipipe.kv_cache.pages import PageAllocator


def test_lowest_ids_are_handed_out_first() -> None:
    pages = PageAllocator(num_pages=6, page_size=16)
    assert pages.allocate(4) == (0, 1, 2, 3)
    pages.free((2, 0))
    assert pages.allocate(3) == (0, 2, 4)
    assert pages.num_free == 1


def test_asking_for_too_many_takes_nothing_and_names_the_numbers() -> None:
    pages = PageAllocator(num_pages=3, page_size=16)
    pages.allocate(1)
    with pytest.raises(OutOfPagesError, match=r"3 KV pages asked for, 2 of 3 are free"):
        pages.allocate(3)
    assert pages.num_free == 2
    assert pages.allocate(2) == (1, 2)


def test_freeing_twice_or_a_foreign_page_asserts() -> None:
    pages = PageAllocator(num_pages=3, page_size=16)
    taken = pages.allocate(1)
    pages.free(taken)
    with pytest.raises(AssertionError, match="page 0 is freed twice"):
        pages.free(taken)
    with pytest.raises(AssertionError, match="page 3 is not of this pool"):
        pages.free((3,))
    with pytest.raises(AssertionError, match="page -1 is not of this pool"):
        pages.free((-1,))


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_pages_for_tokens_rounds_up(num_tokens: int, num_pages: int) -> None:
    assert PageAllocator(num_pages=4, page_size=16).pages_for_tokens(num_tokens) == num_pages


def test_capacity_is_all_pages() -> None:
    assert PageAllocator(num_pages=4, page_size=16).capacity_tokens == 64


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60))
def test_no_page_has_two_owners_and_none_is_lost(actions: list[tuple[bool, int]]) -> None:
    pages = PageAllocator(num_pages=12, page_size=4)
    owners: list[tuple[int, ...]] = []
    for is_allocation, number in actions:
        if is_allocation and number <= pages.num_free:
            free = set(range(12)) - {page for owned in owners for page in owned}
            taken = pages.allocate(number)
            assert list(taken) == sorted(free)[:number]
            owners.append(taken)
        elif not is_allocation and owners:
            pages.free(owners.pop(number % len(owners)))
        assert pages.num_free == 12 - sum(len(owned) for owned in owners)
