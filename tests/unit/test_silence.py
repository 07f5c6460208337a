"""Who has been silent for too long: a scripted clock, no messages."""

from __future__ import annotations

import pytest

from mpipipe.control_plane.messages import Heartbeat
from mpipipe.control_plane.silence import (
    BOOT_FACTOR,
    Silence,
    SilenceWatch,
    interval_s,
    silence_sentence,
)

RUNNING = Heartbeat("n2", stage=2, step=417, booting=False)


class Listener:
    """A rank that watches others and ticks as often as it should."""

    def __init__(self, *ranks: int, timeout_s: float = 10.0) -> None:
        self.now_s = 100.0
        self.watch = SilenceWatch(ranks, timeout_s, self.now_s)
        self.interval_s = interval_s(timeout_s)

    def listen(self, seconds: float, beats: dict[int, Heartbeat] | None = None) -> Silence | None:
        """Tick for `seconds` while `beats` come at every tick; the first silence that is found."""
        for _ in range(round(seconds / self.interval_s)):
            self.now_s += self.interval_s
            for rank, beat in (beats or {}).items():
                self.watch.heard(rank, beat)
            if (found := self.watch.tick(self.now_s)) is not None:
                return found
        return None


def test_a_rank_that_is_heard_is_never_late() -> None:
    assert Listener(1, 2).listen(1000, {1: RUNNING, 2: RUNNING}) is None


def test_the_silent_rank_is_found_just_beyond_the_limit() -> None:
    listener = Listener(1, 2)
    listener.listen(5, {1: RUNNING, 2: RUNNING})
    assert listener.listen(10, {1: RUNNING}) is None
    found = listener.listen(2, {1: RUNNING})
    assert found is not None
    assert (found.rank, found.limit_s, found.last) == (2, 10.0, RUNNING)
    assert found.silent_s == pytest.approx(11.0)


def test_a_sign_of_life_starts_the_count_again() -> None:
    listener = Listener(1)
    for _ in range(20):
        assert listener.listen(9, {}) is None
        assert listener.listen(1, {1: RUNNING}) is None


def test_time_in_which_this_rank_did_not_listen_does_not_count() -> None:
    listener = Listener(1)
    listener.listen(3, {1: RUNNING})
    for _ in range(4):  # stopped for an hour, again and again, as a debugger or a laptop does
        listener.now_s += 3600
        assert listener.watch.tick(listener.now_s) is None
    assert listener.listen(2) is None
    assert listener.listen(2) is not None  # but a rank that stays silent is found all the same


def test_a_rank_that_was_held_up_before_gets_as_much_more() -> None:
    listener = Listener(1)
    held_up = Heartbeat("n2", stage=2, step=417, booting=False, deaf_s=25.0)
    listener.listen(1, {1: held_up})
    assert listener.listen(35) is None
    assert listener.listen(1) is not None


def test_a_rank_that_boots_gets_more_and_so_does_one_that_was_never_heard() -> None:
    for beats in ({1: Heartbeat("n2", phase="load")}, {}):
        listener = Listener(1)
        listener.listen(1, beats)
        assert listener.listen(10 * BOOT_FACTOR - 1) is None
        assert listener.listen(2) is not None


def test_of_several_silent_ranks_the_one_that_is_silent_longest_is_named() -> None:
    listener = Listener(1, 2, 3, timeout_s=4.0)
    listener.listen(2, {1: RUNNING, 2: RUNNING, 3: RUNNING})
    listener.listen(1.6, {1: RUNNING, 3: RUNNING})
    found = listener.listen(10)
    assert found is not None
    assert found.rank == 2
    both = Listener(3, 1)
    found = both.listen(100)
    assert found is not None
    assert found.rank == 1


def test_a_longer_timeout_takes_effect_at_once() -> None:
    listener = Listener(1, timeout_s=2.0)
    listener.listen(1, {1: RUNNING})
    listener.watch.timeout_s = 60.0
    assert listener.listen(50) is None


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (RUNNING, ["rank 2 on n2 (stage 2)", "silent for 12.3 s", "its last step was 417"]),
        (Heartbeat("n2", stage=2, phase="load"), ["(stage 2)", "in the phase 'load'"]),
        (Heartbeat("n2", stage=2, booting=False), ["has run no step yet"]),
        (Heartbeat("n2", phase="import"), ["rank 2 on n2 has been", "'import'"]),
    ],
)
def test_the_sentence_has_rank_host_stage_and_last_step(last: Heartbeat, words: list[str]) -> None:
    sentence = silence_sentence(Silence(2, 12.34, 10.0, last), "rank 2 on n2")
    for word in [*words, "heartbeat_timeout_s", "output.resume=true"]:
        assert word in sentence
