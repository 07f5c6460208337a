"""What simulated stages read of rows that begin with the same pages, from the messages alone."""

from __future__ import annotations

import pytest

from mpipipe.control_plane.messages import (
    DecodeScheduled,
    PagesRestored,
    ScheduledSequence,
    StepScheduled,
)
from mpipipe.planning.padding import joined_tokens
from mpipipe.simulation.followed_steps import FollowedSteps

SIZE = 16
COMMON = tuple(range(64))  # 1,024 tokens


def prefill(followed: FollowedSteps, step: int, sequence_id: int, pages: tuple[int, ...]) -> None:
    """All whole pages of a prompt are computed, and it samples; what others filled is not."""
    shared = 0 if sequence_id == 0 else 1024
    num_tokens = len(pages) * SIZE
    chunk = ScheduledSequence(sequence_id, shared, num_tokens - shared, pages, sample=True)
    followed.open(sequence_id)
    followed.follow(StepScheduled(step, 0, (chunk,), steady=False))


def decode(
    followed: FollowedSteps,
    step: int,
    rows: int,
    left: tuple[int, ...] = (),
    joined: tuple[int, ...] = (),
) -> int:
    """Mean tokens that a row reads."""
    message = DecodeScheduled(step, 0, rows, left, joined, (), (), steady=True)
    return followed.follow(message)[0].context_tokens


def begun(shared_page_size: int, *, pads: bool = True) -> FollowedSteps:
    """Three prompts of 1,040 tokens that begin alike."""
    followed = FollowedSteps(1, pads=pads, shared_page_size=shared_page_size)
    for sequence_id in range(3):
        prefill(followed, sequence_id, sequence_id, (*COMMON, 100 + sequence_id))
    return followed


@pytest.mark.parametrize("pads", [True, False], ids=["cpu", "gpu"])
def test_what_rows_share_counts_once(pads: bool) -> None:
    """1,024 tokens once, and 17 of each row; in parts of eight tokens."""
    once, each = begun(SIZE, pads=pads), begun(0, pads=pads)
    assert decode(once, 3, 3, joined=(0, 1, 2)) == round((1024 + 3 * 17) / 3 / 8) * 8
    assert decode(each, 3, 3, joined=(0, 1, 2)) == round(1041 / 8) * 8


def test_two_rows_spare_a_gpu_too_little() -> None:
    """1,024 tokens: less than what the further launches cost."""
    followed = begun(SIZE, pads=False)
    assert decode(followed, 3, 2, joined=(0, 1)) == round(1041 / 8) * 8


def test_rows_that_go_share_no_more_and_those_that_come_back_do() -> None:
    followed = begun(SIZE)
    decode(followed, 3, 3, joined=(0, 1, 2))
    assert decode(followed, 4, 1, left=(0, 2)) == round(1042 / 8) * 8
    followed.close([2])
    # One was preempted, and what is its own comes back elsewhere.
    followed.restore(PagesRestored(0, 1041, (0, 1), (*COMMON, 200, 201)))
    assert decode(followed, 5, 2, joined=(0,)) == round((1024 + 2 * 19) / 2 / 8) * 8
    followed.open(0)  # now it is computed anew, with other pages
    decode(followed, 6, 1, left=(1,))
    prefill(followed, 7, 0, tuple(range(300, 365)))
    assert decode(followed, 8, 2, joined=(0,)) == round(1045 / 8) * 8


@pytest.mark.parametrize(("shared", "read"), [(256.0, 256 + 3 * 44), (255.0, 3 * 300)])
def test_too_little_in_common_is_read_by_each(shared: float, read: float) -> None:
    """Three sequences of 300 tokens; 256 in common spare 512."""
    assert joined_tokens([300.0] * 3, [shared] * 3) == read
