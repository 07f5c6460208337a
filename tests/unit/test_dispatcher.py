"""Which replica gets which request: scripted events, and any order of them."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpipipe.scheduler.dispatcher import Dispatcher, expected_work
from mpipipe.types import Request, SamplingParams


def request(index: int, num_prompt_tokens: int = 1, max_new_tokens: int = 8) -> Request:
    prompt_ids = (5,) * num_prompt_tokens
    return Request(f"r{index}", index, prompt_ids, SamplingParams(max_new_tokens=max_new_tokens))


def handed_out(dispatcher: Dispatcher) -> dict[int, list[int]]:
    return {
        given.replica: [request.index for request in given.requests]
        for given in dispatcher.hand_out()
    }


def test_the_longest_goes_first_and_equal_ones_in_the_order_of_the_input() -> None:
    requests = [request(0, 1, 8), request(1, 1, 20), request(2, 60, 8), request(3, 1, 20)]
    dispatcher = Dispatcher(requests, [4])
    dispatcher.asked(0, 4)
    assert handed_out(dispatcher) == {0: [1, 3, 2, 0]}


def test_nothing_is_handed_out_before_all_have_asked_and_then_evenly() -> None:
    dispatcher = Dispatcher([request(index) for index in range(6)], [32, 32])
    dispatcher.asked(0, 32)
    assert dispatcher.hand_out() == []
    dispatcher.asked(1, 32)
    assert handed_out(dispatcher) == {0: [0, 2, 4], 1: [1, 3, 5]}
    assert (dispatcher.num_waiting, dispatcher.num_held, dispatcher.held_by(1)) == (0, 6, 3)


def test_a_long_request_counts_as_much_as_several_short_ones() -> None:
    requests = [request(0, 1, 100), *(request(index, 1, 20) for index in range(1, 6))]
    dispatcher = Dispatcher(requests, [8, 8])
    dispatcher.asked(0, 8)
    dispatcher.asked(1, 8)
    assert handed_out(dispatcher) == {0: [0], 1: [1, 2, 3, 4, 5]}


def test_a_replica_that_runs_twice_as_many_gets_twice_as_many() -> None:
    dispatcher = Dispatcher([request(index) for index in range(9)], [4, 8])
    dispatcher.asked(0, 9)
    dispatcher.asked(1, 9)
    assert {number: len(got) for number, got in handed_out(dispatcher).items()} == {0: 3, 1: 6}


def test_equal_requests_of_the_last_wave_wait_for_places() -> None:
    dispatcher = Dispatcher([request(index) for index in range(14)], [4, 4])
    dispatcher.asked(0, 5)
    dispatcher.asked(1, 4)
    assert handed_out(dispatcher) == {0: [0, 2, 4, 6], 1: [1, 3, 5, 7]}  # 6 are left for 8 places
    dispatcher.asked(0, 1)
    assert handed_out(dispatcher) == {}
    dispatcher.ended(0, 0)
    assert handed_out(dispatcher) == {0: [8]}
    dispatcher.ended(1, 1)
    assert handed_out(dispatcher) == {}  # it has not asked
    dispatcher.asked(1, 2)
    assert handed_out(dispatcher) == {1: [9]}


def test_unlike_requests_and_those_of_earlier_waves_are_handed_out_beforehand() -> None:
    unlike = Dispatcher([request(index, 1, 40 - index) for index in range(14)], [4, 4])
    early = Dispatcher([request(index) for index in range(18)], [4, 4])
    for dispatcher in (unlike, early):
        dispatcher.asked(0, 5)
        dispatcher.asked(1, 4)
        assert {r: len(got) for r, got in handed_out(dispatcher).items()} == {0: 5, 1: 4}


def test_the_one_that_is_free_first_gets_the_next() -> None:
    dispatcher = Dispatcher([request(index, 1, 80 - index) for index in range(6)], [1, 1])
    dispatcher.asked(0, 1)
    dispatcher.asked(1, 1)
    assert handed_out(dispatcher) == {0: [0], 1: [1]}
    for index in (1, 2, 3):  # replica 1 is four times as fast
        dispatcher.ended(1, index)
        dispatcher.asked(1, 1)
        assert handed_out(dispatcher) == {1: [index + 1]}
    dispatcher.ended(0, 0)
    dispatcher.asked(0, 1)
    assert handed_out(dispatcher) == {0: [5]}


def test_what_was_asked_for_and_not_had_yet_is_not_forgotten() -> None:
    dispatcher = Dispatcher([request(0)], [1, 1])
    dispatcher.asked(0, 1)
    dispatcher.asked(1, 0)  # it stands by: an ask for nothing counts as the first
    assert handed_out(dispatcher) == {0: [0]}
    assert dispatcher.has_asked(1)


def test_after_a_stop_nothing_is_handed_out() -> None:
    dispatcher = Dispatcher([request(index) for index in range(3)], [1])
    dispatcher.asked(0, 1)
    assert handed_out(dispatcher) == {0: [0]}
    assert dispatcher.stop() == 2
    dispatcher.ended(0, 0)
    dispatcher.asked(0, 1)
    assert (dispatcher.hand_out(), dispatcher.num_waiting, dispatcher.num_held) == ([], 0, 0)


def test_a_request_ends_once_and_where_it_is() -> None:
    dispatcher = Dispatcher([request(0), request(1)], [1, 1])
    dispatcher.asked(0, 1)
    dispatcher.asked(1, 1)
    dispatcher.hand_out()
    with pytest.raises(AssertionError, match="replica 1 ended request 0"):
        dispatcher.ended(1, 0)
    dispatcher.ended(0, 0)
    with pytest.raises(AssertionError, match="replica 0 ended request 0"):
        dispatcher.ended(0, 0)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=40),
    capacities=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    chance=st.integers(0, 2**32),
)
def test_each_request_once_longest_first_and_no_replica_idle_while_work_waits(
    lengths: list[tuple[int, int]], capacities: list[int], chance: int
) -> None:
    """Replicas that hold up to their capacity end requests in any order and ask for as many."""
    random = Random(chance)
    requests = [request(index, *length) for index, length in enumerate(lengths)]
    dispatcher = Dispatcher(requests, capacities)
    held: list[list[int]] = [[] for _ in capacities]
    times = Counter[int]()
    latest_work = float("inf")
    for number in random.sample(range(len(capacities)), len(capacities)):
        assert dispatcher.hand_out() == [] or not requests
        dispatcher.asked(number, capacities[number])
    while True:
        given = dispatcher.hand_out()
        works = []
        for part in given:
            held[part.replica] += [given_one.index for given_one in part.requests]
            times.update(given_one.index for given_one in part.requests)
            works += [expected_work(given_one) for given_one in part.requests]
        # What is handed out now is no longer than anything before.
        assert max(works, default=0.0) <= latest_work
        latest_work = min([latest_work, *works])
        for number, capacity in enumerate(capacities):
            assert len(held[number]) == dispatcher.held_by(number) <= capacity
            assert not dispatcher.num_waiting or len(held[number]) == capacity
        busy = [number for number in range(len(capacities)) if held[number]]
        if not busy:
            break
        number = random.choice(busy)
        ended = random.sample(held[number], random.randint(1, len(held[number])))
        for index in ended:
            held[number].remove(index)
            dispatcher.ended(number, index)
        dispatcher.asked(number, len(ended))
    assert times == Counter(range(len(requests)))
    assert dispatcher.num_waiting == dispatcher.num_held == 0


def test_equal_events_give_equal_assignments() -> None:
    def run() -> list[dict[int, list[int]]]:
        random = Random(5)
        requests = [request(i, random.randint(1, 9), random.randint(1, 9)) for i in range(50)]
        dispatcher = Dispatcher(requests, [3, 3, 3])
        for number in range(3):
            dispatcher.asked(number, 3)
        told = [handed_out(dispatcher)]
        while dispatcher.num_held:
            number = random.choice([n for n in range(3) if dispatcher.held_by(n)])
            held = [i for got in told for i in got.get(number, [])]
            index = held[-dispatcher.held_by(number)]
            dispatcher.ended(number, index)
            dispatcher.asked(number, 1)
            told.append(handed_out(dispatcher))
        return told

    assert run() == run()


# ---- prompts that begin alike --------------------------------------------------------------------


def sharers(*groups: int) -> list[Request]:
    """So many requests of each group, mixed: 40 common tokens, and one of their own."""
    order = [(member, group) for group, size in enumerate(groups) for member in range(size)]
    return [
        Request(
            f"r{index}", index, (*(100 + group,) * 40, member), SamplingParams(max_new_tokens=8)
        )
        for index, (member, group) in enumerate(sorted(order))
    ]


def group_of(request: Request) -> int:
    return request.prompt_ids[0] - 100


def test_those_that_begin_alike_go_to_one_replica() -> None:
    dispatcher = Dispatcher(sharers(4, 4, 4, 4), [8, 8], page_size=16)
    for replica in range(2):
        dispatcher.asked(replica, 8)
    for handed in dispatcher.hand_out():
        groups = [group_of(request) for request in handed.requests]
        assert groups == sorted(groups)
        assert len(set(groups)) == 2
    assert not dispatcher.num_waiting


def test_no_replica_is_idle_while_a_group_is_left() -> None:
    dispatcher = Dispatcher(sharers(12), [4, 4, 4], page_size=16)
    for replica in range(3):
        dispatcher.asked(replica, 4)
    assert [len(handed.requests) for handed in dispatcher.hand_out()] == [4, 4, 4]


def test_what_is_left_of_a_group_waits_no_more_when_told_to_stop() -> None:
    dispatcher = Dispatcher(sharers(6), [2, 2], page_size=16)
    for replica in range(2):
        dispatcher.asked(replica, 2)
    dispatcher.hand_out()
    assert dispatcher.stop() == 2
    dispatcher.asked(0, 2)
    assert not dispatcher.hand_out()
