"""Which prompts run together, against the plain definition of a shared page."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpipipe.config.schema import Config, MemoryConfig
from mpipipe.planning.plan import Decisions
from mpipipe.planning.prefix_groups import prefix_groups, reads_prefixes_once
from mpipipe.planning.workload import Workload


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


ALIKE = Workload(lengths=((100, 9), (100, 9)), shared_ratio=0.4)


@pytest.mark.parametrize(
    ("asked", "attention", "sharing_tokens", "workload", "wanted"),
    [
        (True, "triton", 512, ALIKE, True),
        (True, "triton", 512, Workload(), True),  # of requests that are not known
        (True, "triton", 512, Workload(lengths=((100, 9), (100, 9))), False),
        (True, "triton", 0, ALIKE, False),  # no pages are shared
        (True, "sdpa", 512, ALIKE, False),
        (True, "flashinfer", 512, ALIKE, False),
        (False, "triton", 512, ALIKE, False),
    ],
)
def test_gpus_read_once_what_prompts_share(
    asked: bool, attention: str, sharing_tokens: int, workload: Workload, wanted: bool
) -> None:
    decisions = Decisions(Config(memory=MemoryConfig(read_prefixes_once=asked)), [])
    assert reads_prefixes_once(decisions, attention, sharing_tokens, workload) == wanted
    told = [note.setting for note in decisions.notes]
    is_nothing_shared = bool(workload.lengths) and not workload.shared_ratio
    assert told == ["memory.read_prefixes_once"] * is_nothing_shared


def test_it_is_on_unless_it_is_switched_off() -> None:
    assert Config().memory.read_prefixes_once
