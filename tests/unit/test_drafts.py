"""Drafts: what is found in a text, and when it is verified."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from mpipipe.control_plane.messages import DecodeScheduled, StepScheduled
from mpipipe.planning.plan import DraftPlan
from mpipipe.scheduler.core import SchedulerCore, SchedulerLimits
from mpipipe.scheduler.draft_history import DraftHistory
from mpipipe.scheduler.drafts import NgramDrafter, agreed
from mpipipe.scheduler.instructions import Finished
from mpipipe.types import Request, SamplingParams

# One sequence on two stages of an H100: rows are nearly free.
CHEAP = DraftPlan(7, (1, 2, 4, 8), (3.0e-3, 3.05e-3, 3.1e-3, 3.2e-3), 0.0, 0.4e-3)
# A CPU that computes as long for every row.
COSTLY = DraftPlan(7, (1, 2, 4, 8), (1.0, 2.0, 4.0, 8.0), 0.0)


# ---- what is found -------------------------------------------------------------------------------


def history_of(tokens: list[int], num_prompt_tokens: int | None = None) -> DraftHistory:
    history = DraftHistory(tokens, len(tokens) if num_prompt_tokens is None else num_prompt_tokens)
    history.read()
    return history


def test_what_followed_the_last_ids_before_is_drafted() -> None:
    history = history_of([1, 2, 3, 4, 5, 9, 1, 2])
    assert history.draft(3) == (3, 4, 5)
    assert history.draft(1) == (3,)
    assert history.draft(0) == ()


def test_the_longest_and_then_the_latest_match_counts() -> None:
    assert history_of([5, 1, 2, 7, 9, 1, 2, 8, 5, 1, 2]).draft(1) == (7,)  # behind 5, 1, 2
    assert history_of([1, 2, 7, 9, 1, 2, 8, 6, 1, 2]).draft(1) == (8,)


def test_a_single_id_that_recurs_is_not_enough() -> None:
    assert history_of([1, 2, 3, 1]).draft(4) == ()
    assert history_of([7]).draft(4) == ()


def test_what_recurs_up_to_the_end_goes_on_recurring() -> None:
    assert history_of([4, 4, 4]).draft(5) == (4, 4, 4, 4, 4)
    assert history_of([1, 2, 3, 1, 2, 3, 1, 2]).draft(7) == (3, 1, 2, 3, 1, 2, 3)


def test_the_chance_follows_what_was_foreseen_and_prompts_do_not_count() -> None:
    tokens = [1, 2, 3, 4] * 20
    history = history_of(tokens)
    before = history.chance
    assert before == pytest.approx(0.05)
    for number in range(40):
        tokens.append(1 + number % 4)
        history.read()
    assert history.chance > 0.9
    for number in range(20):
        tokens += [50 + number]  # is not what was foreseen; behind it nothing is
        tokens += [1, 2]
        history.read()
    assert 0.0 < history.chance < 0.2


def test_reading_in_pieces_is_reading_at_once() -> None:
    random = Random(3)
    text = [random.randrange(4) for _ in range(300)]
    tokens: list[int] = []
    pieces = DraftHistory(tokens, 10)
    for token in text:
        tokens.append(token)
        if random.random() < 0.4:
            pieces.read()
    pieces.read()
    whole = history_of(text, 10)
    assert pieces.chance == pytest.approx(whole.chance)
    assert pieces.draft(6) == whole.draft(6)


@pytest.mark.parametrize(
    ("draft", "sampled", "count"),
    [((), (5,), 0), ((1, 2), (1, 2, 3), 2), ((1, 2), (1, 9, 3), 1), ((1, 2), (9, 2, 3), 0)],
)
def test_the_longest_run_that_the_model_chose_is_kept(
    draft: tuple[int, ...], sampled: tuple[int, ...], count: int
) -> None:
    assert agreed(draft, sampled) == count


# ---- when it pays --------------------------------------------------------------------------------


class Play:
    """A pipeline that completes one request after another, as a text goes on."""

    def __init__(
        self, plan: DraftPlan, *, lookahead: int, next_token: Callable[[list[int]], int]
    ) -> None:
        limits = SchedulerLimits(2, 4, 64, 400, 4, 1500, lookahead)
        self.core = SchedulerCore(
            limits,
            prefill="phases" if lookahead else "mixed",
            drafter=NgramDrafter(plan),
        )
        self.next_token = next_token
        self.steps: list[DecodeScheduled] = []
        self.num_idle = 0  # how often nothing was in flight behind a decode step that came back

    def run(self, prompt: list[int], num_tokens: int) -> list[int]:
        sampling = SamplingParams(max_new_tokens=num_tokens)
        sequence_id = self.core.add(Request("r", 0, tuple(prompt), sampling))
        text = list(prompt)
        flight: deque[StepScheduled | DecodeScheduled] = deque()
        done: list[int] = []
        while not self.core.is_idle:
            while (sent := self.core.next_step()) is not None:
                flight.append(sent)
                if isinstance(sent, DecodeScheduled):
                    self.steps.append(sent)
            step = flight.popleft()
            ids: list[int] = []
            if isinstance(step, DecodeScheduled) and step.verified:
                draft = step.verified[0].token_ids[1:]
                ids = [self.next_token([*text, *draft[:place]]) for place in range(step.num_rows)]
                text += ids[: agreed(draft, ids) + 1]
            elif step.num_sampled:
                ids = [self.next_token(text)]
                text += ids
            self.num_idle += not flight
            found = self.core.sampled(step.step, ids)
            while accepted := self.core.accepted():
                found += accepted
            done += [i for each in found if isinstance(each, Finished) for i in each.token_ids]
        assert sequence_id == 0
        return done


def copying(period: int) -> Callable[[list[int]], int]:
    return lambda text: text[-period]


def never_twice(text: list[int]) -> int:
    return 1000 + len(text)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_text_that_repeats_takes_few_steps(lookahead: int) -> None:
    play = Play(CHEAP, lookahead=lookahead, next_token=copying(10))
    completion = play.run(list(range(10)) * 3, 128)
    assert completion == [number % 10 for number in range(128)]
    use = play.core.statistics().drafts
    assert len(play.steps) < 128 / 3
    assert use.num_accepted == use.num_drafted  # it goes on for ever
    assert use.num_saved_steps == use.num_accepted > 80
    assert len(play.steps) >= 127 - use.num_saved_steps


@pytest.mark.parametrize("lookahead", [1, 2])
def test_text_that_never_repeats_is_never_awaited(lookahead: int) -> None:
    play = Play(CHEAP, lookahead=lookahead, next_token=never_twice)
    play.run(list(range(10)) * 3, 128)
    assert not any(step.verified for step in play.steps)
    assert play.num_idle == 1  # behind the last step


@pytest.mark.parametrize("seed", range(5))
def test_where_few_drafts_are_right_few_steps_are_awaited(seed: int) -> None:
    """Of pairs that recur, what follows is foreseen one time in eight."""
    random = Random(seed)
    text_of: dict[int, int] = {}

    def noisy(text: list[int]) -> int:
        return text_of.setdefault(len(text), random.randrange(8))

    play = Play(CHEAP, lookahead=1, next_token=noisy)
    play.run([random.randrange(8) for _ in range(200)], 800)
    seconds = sum(predicted_s(CHEAP, step) for step in play.steps)
    seconds += CHEAP.awaited_s * (play.num_idle - 1)
    assert 799 * CHEAP.step_s[0] / seconds > 0.97


def predicted_s(plan: DraftPlan, step: DecodeScheduled) -> float:
    return next(s for rows, s in zip(plan.rows, plan.step_s, strict=True) if rows >= step.num_rows)


def test_the_scheduler_backs_off_when_the_text_changes_and_comes_back() -> None:
    """Repeats, then random ids, then repeats again."""
    random = Random(1)
    text_of: dict[int, int] = {}

    def changing(text: list[int]) -> int:
        if 200 <= len(text) < 400:
            return text_of.setdefault(len(text), random.randrange(6))
        return text[-5] if len(text) % 400 > 8 else len(text) % 5

    play = Play(CHEAP, lookahead=1, next_token=changing)
    play.run(list(range(5)) * 4, 600)
    use = play.core.statistics().drafts
    assert use.num_accepted > 200
    assert use.num_drafted - use.num_accepted < 110


def test_rows_that_cost_as_much_as_steps_are_not_drafted() -> None:
    play = Play(COSTLY, lookahead=0, next_token=copying(4))
    play.run(list(range(4)) * 3, 60)
    assert not any(step.verified for step in play.steps)


def test_a_long_context_counts() -> None:
    """Every row reads the whole cache."""
    wide = DraftPlan(7, (1, 2, 4, 8), CHEAP.step_s, key_s=3e-6, awaited_s=0.4e-3)
    short, long = (Play(wide, lookahead=1, next_token=copying(5)) for _ in range(2))
    short.run(list(range(5)) * 2, 40)
    assert short.core.statistics().drafts.num_drafted > 0
    long.run(list(range(5)) * 280, 40)  # 4.2 ms a row for its keys
    assert long.core.statistics().drafts.num_drafted < short.core.statistics().drafts.num_drafted


@pytest.mark.parametrize(
    "options", [{"temperature": 0.5}, {"repetition_penalty": 1.2}, {"num_logprobs": 0}]
)
def test_what_is_not_the_likeliest_token_alone_is_not_drafted(options: dict[str, float]) -> None:
    core = SchedulerCore(
        SchedulerLimits(1, 4, 64, 400, 4, 1500, 0), prefill="mixed", drafter=NgramDrafter(CHEAP)
    )
    sampling = SamplingParams(max_new_tokens=40, **options)  # type: ignore[arg-type]
    core.add(Request("r", 0, (3, 3, 3, 3), sampling))
    while not core.is_idle:
        step = core.next_step()
        assert step is not None
        assert not (isinstance(step, DecodeScheduled) and step.verified)
        core.sampled(step.step, (3,) * step.num_sampled)


@pytest.mark.parametrize("alone", [True, False])
def test_drafts_may_have_to_wait_until_no_other_slot_has_sequences(alone: bool) -> None:
    plan = replace(CHEAP, alone=alone)
    core = SchedulerCore(SchedulerLimits(2, 4, 64, 400, 4, 1500, 1), drafter=NgramDrafter(plan))
    for index, num_tokens in enumerate((120, 60)):
        sampling = SamplingParams(max_new_tokens=num_tokens)
        core.add(Request(f"r{index}", index, (3,) * 6, sampling))
    flight: deque[StepScheduled | DecodeScheduled] = deque()
    running = set()
    while not core.is_idle:
        while (sent := core.next_step()) is not None:
            flight.append(sent)
        step = flight.popleft()
        if isinstance(step, DecodeScheduled) and step.verified:
            running.add(core.statistics().num_running)
        core.sampled(step.step, (3,) * step.num_sampled)
        while core.accepted():
            pass
    assert running == ({1} if alone else {1, 2})
