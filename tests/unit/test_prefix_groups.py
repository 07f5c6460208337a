"""Which prompts run together, against the plain definition of a shared page."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mpipipe.planning.prefix_groups import prefix_groups


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def test_prompts_that_begin_like_no_other_keep_their_order() -> None:
    found = prefix_groups([ids("aabb"), ids("bbaa"), ids("abab"), ids("")], 2)
    assert found.groups == ((0,), (1,), (2,), (3,))
    assert found.num_shared == 0


def test_sharers_come_behind_the_first_of_them() -> None:
    prompts = [ids(text) for text in ("aabbc", "ddeef", "aabbd", "gghhi", "ddeeg", "aabb")]
    found = prefix_groups(prompts, 2)
    assert found.groups == ((0, 2), (5,), (1, 4), (3,))
    assert found.order == [0, 2, 5, 1, 4, 3]
    assert found.num_shared == 4 + 2 + 4  # the last page of "aabb" is computed for its logits


def test_a_short_common_beginning_makes_no_group_of_all() -> None:
    """As a chat's template: the documents behind it tell who belongs together."""
    first, second = "ss" + "a" * 40, "ss" + "b" * 40
    texts = [first + "1", second + "1", first + "2", second + "2", "ss" + "c" * 40]
    found = prefix_groups([ids(text) for text in texts], 2)
    assert found.groups == ((0, 2), (1, 3), (4,))
    assert found.num_shared == 4 * 2 + 2 * 40


def test_text_is_compared_as_ids_are() -> None:
    assert prefix_groups([b"aabbc", b"aabbd", b"xaabb"], 2).groups == ((0, 1), (2,))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 1), max_size=12).map(tuple), max_size=12), st.integers(1, 3)
)
def test_as_many_tokens_are_shared_as_the_order_says(
    prompts: list[tuple[int, ...]], page_size: int
) -> None:
    found = prefix_groups(prompts, page_size)
    assert sorted(found.order) == list(range(len(prompts)))
    known: set[tuple[int, ...]] = set()
    num_shared = 0
    for number in found.order:
        prompt = prompts[number]
        whole = [prompt[:end] for end in range(page_size, len(prompt), page_size)]
        num_shared += page_size * sum(pages in known for pages in whole)
        known.update(whole)
    assert found.num_shared == num_shared
