"""Pages with several owners, against a plain count of owners and against the simple allocator."""

from __future__ import annotations

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mpipipe.errors import OutOfPagesError
from mpipipe.kv_cache.pages import PageAllocator
from mpipipe.kv_cache.shared_pages import KnownPage, SharedPages

NUM_PAGES = 12


Text = tuple[int, ...]


def chain(
    pages: SharedPages, *texts: Text, memory: dict[int, tuple[Text, ...]] | None = None
) -> list[int]:
    """The pages of a sequence that computes and tells these, as far as it does not find them."""
    owned, known, memory = [], pages.root, {} if memory is None else memory
    for number, text in enumerate(texts, 1):
        found = known.children.get(text)
        if found is None:
            (page,) = pages.allocate(1)
            memory[page] = texts[:number]
            found = pages.tell(page, known, text)
        else:
            assert memory.get(found.page, texts[:number]) == texts[:number]
            pages.share(found)
        known = found
        owned.append(known.page)
    return owned


def find(pages: SharedPages, *texts: Text) -> KnownPage | None:
    known: KnownPage | None = pages.root
    for text in texts:
        known = None if known is None else known.children.get(text)
    return known


A, B, C = (1, 2), (1, 3), (4, 4)


def test_a_page_is_found_behind_exactly_the_tokens_that_it_was_computed_behind() -> None:
    pages = SharedPages(6, 2)
    owned = chain(pages, A, B)
    other = chain(pages, C, B)
    assert set(owned).isdisjoint(other)
    assert find(pages, B) is None
    found = find(pages, A, B)
    assert found is not None
    assert [found.page, found.depth] == [owned[1], 2]


def test_a_page_is_free_when_its_last_owner_has_left() -> None:
    pages = SharedPages(4, 2)
    first, second = chain(pages, A, B), chain(pages, A, B)
    assert first == second
    assert pages.num_free == 2
    pages.free(first)
    assert pages.num_free == 2
    pages.free(second)
    assert pages.num_free == 4
    with pytest.raises(AssertionError, match="freed twice"):
        pages.free(second)


def test_what_is_known_is_forgotten_last_and_the_longest_without_owner_first() -> None:
    pages = SharedPages(6, 2)
    first, second = chain(pages, A, B), chain(pages, C)
    unknown = pages.allocate(1)
    for owned in (first, second, unknown):
        pages.free(owned)
    assert set(pages.allocate(3)).isdisjoint([*first, *second])  # three others are free
    pages.allocate(1)
    assert find(pages, A) is not None
    assert find(pages, A, B) is None
    pages.allocate(1)
    assert find(pages, A) is None
    assert find(pages, C) is not None
    with pytest.raises(OutOfPagesError):
        pages.allocate(2)
    assert find(pages, C) is not None


def test_a_page_that_is_found_again_is_as_if_new() -> None:
    pages = SharedPages(2, 2)
    pages.free(chain(pages, A))
    pages.free(chain(pages, C))
    pages.free(chain(pages, A))
    pages.allocate(1)
    assert find(pages, A) is not None
    assert find(pages, C) is None


Texts = st.lists(st.sampled_from([A, B, C]), max_size=4)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 2), Texts, st.integers(0, 4)), max_size=50))
def test_owners_are_counted_and_nobody_gets_a_page_that_has_one(
    actions: list[tuple[int, list[Text], int]],
) -> None:
    """A sequence has a chain that it tells, and pages of its own behind it."""
    pages = SharedPages(NUM_PAGES, 2)
    sequences: list[tuple[list[int], int]] = []  # pages; how many of them it tells
    memory: dict[int, tuple[Text, ...]] = {}  # by page: what it was computed from
    for action, texts, number in actions:
        if action and len(texts) + number <= pages.num_free:
            owners = {page for owned, _ in sequences for page in owned}
            told = chain(pages, *texts, memory=memory)
            own = pages.allocate(number)
            assert owners.isdisjoint(own)
            memory.update(dict.fromkeys(own, ()))
            sequences.append(([*told, *own], len(told)))
        elif not action and sequences:
            pages.free(sequences.pop(number % len(sequences))[0])
        for page in range(NUM_PAGES):
            assert pages.num_owners(page) == sum(page in owned for owned, _ in sequences)
        owners = {page for owned, _ in sequences for page in owned}
        assert pages.num_free == NUM_PAGES - len(owners)
    event(f"most at once: {len(sequences)}")
    for owned, _ in sequences:
        pages.free(owned)
    assert pages.num_free == NUM_PAGES
    assert sorted(pages.allocate(NUM_PAGES)) == list(range(NUM_PAGES))
    assert not pages.root.children


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60))
def test_without_known_pages_it_hands_out_those_of_the_simple_allocator(
    actions: list[tuple[bool, int]],
) -> None:
    pages, simple = SharedPages(NUM_PAGES, 4), PageAllocator(NUM_PAGES, 4)
    owned: list[tuple[int, ...]] = []
    for is_allocation, number in actions:
        if is_allocation and number <= simple.num_free:
            owned.append(pages.allocate(number))
            assert owned[-1] == simple.allocate(number)
        elif not is_allocation and owned:
            freed = owned.pop(number % len(owned))
            pages.free(freed)
            simple.free(freed)
        assert pages.num_free == simple.num_free
