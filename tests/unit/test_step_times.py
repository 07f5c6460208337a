"""When a stage tells the next one its times, and what becomes of times that do not come."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mpipipe.clock import ScriptedClock
from mpipipe.control_plane.mailbox import Mailbox
from mpipipe.control_plane.messages import Message, StepTimes
from mpipipe.metrics.accounting import StageAccount
from mpipipe.stage import step_times
from mpipipe.stage.step_times import StepTimesLink


@dataclass
class Wire:
    """The mesh of stage 1 of three."""

    sent: list[tuple[int, Message]] = field(default_factory=list)
    inbox: Mailbox[tuple[int, Message]] = field(default_factory=lambda: Mailbox("times"))
    rank: int = 1

    def mailbox(self, kind: type[Message]) -> Mailbox[tuple[int, Message]]:
        assert kind is StepTimes
        return self.inbox

    def send(self, to: int, message: Message) -> None:
        self.sent.append((to, message))


class Linked:
    """The link of stage 1; its clock is 5 s ahead of the head's, that of rank 0 by nothing."""

    def __init__(self, ahead_s: float = 5.0) -> None:
        self.wire, self.clock, self.account = Wire(), ScriptedClock(100.0), StageAccount(1)
        self.told: list[tuple[int, Any]] = []
        self.ahead_s = ahead_s
        self.account.on_step = lambda record, transfer_s: self.told.append(
            (record.step, transfer_s)
        )
        plan: Any = SimpleNamespace(rank_of=lambda stage, lane: stage + 3 * lane, num_stages=3)
        self.link = StepTimesLink(
            plan,
            1,
            mesh=cast("Any", self.wire),
            account=self.account,
            clock=self.clock,
            ahead_s=lambda rank: self.ahead_s if rank == 1 else 0.0,
        )

    def step(self, number: int) -> None:
        """A step that waits for a second and leaves now."""
        now_s = self.clock.now_s()
        self.account.begin(now_s - 1.0)
        self.account.step_scheduled(number, now_s - 1.0)
        self.account.input_ready(number, now_s)
        self.account.computed(number, now_s)
        step: Any = SimpleNamespace(
            step=number, slot=0, num_tokens=1, num_sampled=1, num_sequences=1, phase="decode",
            steady=False,
        )  # fmt: skip
        self.account.sent(step, now_s, needs=number)


def test_a_full_batch_is_one_message_to_the_next_stage() -> None:
    linked = Linked()
    for number in range(130):
        linked.link.computed(float(number))
    first, second = (StepTimes(n, tuple(map(float, range(n, n + 64)))) for n in (0, 64))
    assert linked.wire.sent == [(2, first), (2, second)]
    linked.link.flush()
    assert linked.wire.sent[2:] == [(2, StepTimes(128, (128.0, 129.0)))]
    linked.link.flush()
    assert len(linked.wire.sent) == 3, "nothing is left"


def test_what_has_become_old_is_told_though_the_batch_is_not_full() -> None:
    linked = Linked()
    linked.link.computed(100.0)
    linked.clock.advance(0.2)
    linked.link.poll()
    assert linked.wire.sent == []
    linked.clock.advance(0.1)
    linked.link.poll()
    assert linked.wire.sent == [(2, StepTimes(0, (100.0,)))]


def test_times_are_put_on_this_clock() -> None:
    linked = Linked()
    linked.step(0)  # waited from 99 to 100
    linked.wire.inbox.put((0, StepTimes(0, (94.75,))))
    linked.link.poll()
    assert linked.told == [(0, 0.25)]


def test_a_step_whose_time_does_not_come_is_told_without_after_two_seconds() -> None:
    linked = Linked()
    linked.step(0)
    linked.clock.advance(1.9)
    linked.link.poll()
    assert linked.told == []
    linked.clock.advance(0.2)
    linked.link.poll()
    assert linked.told == [(0, None)]


def test_settling_takes_what_comes_and_gives_the_rest_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "_SETTLE_S", 60.0)  # it comes, however late

    async def settle() -> list[tuple[int, Any]]:
        linked = Linked()
        linked.step(0)
        linked.account.begin(200.0)
        linked.clock.advance(100.0)
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            settling = tasks.create_task(linked.link.settle())
            await asyncio.sleep(0)
            linked.wire.inbox.put((0, StepTimes(0, (94.5,))))
            await settling
        return linked.told

    assert asyncio.run(settle()) == [(0, 0.5)]

    async def in_vain() -> list[tuple[int, Any]]:
        linked = Linked()
        linked.step(0)
        await linked.link.settle()
        return linked.told

    monkeypatch.setattr(step_times, "_SETTLE_S", 0.05)
    assert asyncio.run(in_vain()) == [(0, None)]


def test_times_of_a_clock_that_is_not_known_divide_nothing() -> None:
    linked = Linked(ahead_s=math.nan)
    linked.step(0)
    linked.wire.inbox.put((0, StepTimes(0, (94.75,))))
    linked.link.poll()
    assert linked.told == []
    linked.clock.advance(3.0)
    linked.link.poll()
    assert linked.told == [(0, None)]


def test_times_go_on_when_a_clock_becomes_known() -> None:
    """Ranks measure their clocks while the first steps run: those of a busy machine take long."""
    linked = Linked(ahead_s=math.nan)
    linked.step(0)
    linked.wire.inbox.put((0, StepTimes(0, (94.75,))))
    linked.link.poll()
    linked.clock.advance(3.0)
    linked.link.poll()
    linked.ahead_s = 5.0
    linked.step(0)  # the second of all calls: waited from 102 to 103
    linked.wire.inbox.put((0, StepTimes(1, (97.5,))))
    linked.link.poll()
    assert linked.told == [(0, None), (0, 0.5)]
