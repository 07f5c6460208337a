"""Texts that are made beside the event loop: the same completions, and no step waits for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import aclosing
from typing import cast

import pytest

from mpipipe.control_plane.group import RankGroup
from mpipipe.errors import PromptError
from mpipipe.metrics.log import NullLog
from mpipipe.scheduler import texts
from mpipipe.scheduler.runner import Runner
from mpipipe.scheduler.texts import TextMaker, Texts
from mpipipe.types import Completion, Request
from tests.unit.test_runner import Pipeline, alone, decode, make_core, outcome, requests

LIMIT_S = 20.0


class Maker:
    """`decode_all` of a tokenizer, which remembers where it ran."""

    def __init__(self) -> None:
        self.threads: list[int] = []
        self.has_begun = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.failing: set[tuple[int, ...]] = set()

    def __call__(self, all_ids: Sequence[Sequence[int]]) -> Texts:
        self.threads.append(threading.get_ident())
        self.has_begun.set()
        assert self.may_go_on.wait(LIMIT_S), "the event loop waits for the texts"
        return [self._text(tuple(ids)) for ids in all_ids]

    def _text(self, ids: tuple[int, ...]) -> str | PromptError:
        if ids in self.failing:
            return PromptError("detokenize", "no text: copy the tokenizer again")
        return decode(ids)


def runner_with(
    make: Maker, pipeline: Pipeline, kind: str = "phases", log: NullLog | None = None
) -> Runner:
    return Runner(
        core=make_core(kind),
        group=cast("RankGroup", pipeline),
        clock=pipeline.clock,
        log=log or NullLog(),
        on_request=pipeline.records.append,
        texts=TextMaker(decode, decode_all=make),
    )


def completed(runner: Runner, pipeline: Pipeline, wanted: Sequence[Request]) -> list[Completion]:
    async def run() -> list[Completion]:
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            giving = tasks.create_task(pipeline.give_back())
            try:
                return [completion async for completion in runner.generate(wanted)]
            finally:
                giving.cancel()

    return asyncio.run(run())


@pytest.fixture
def _all_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_MIN_TOKENS", 0)


@pytest.mark.usefixtures("_all_beside")
@pytest.mark.parametrize("kind", ["awaiting", "phases", "mixed"])
@pytest.mark.parametrize("stop", [(), ("e", "zz", "b")], ids=["plain", "stop strings"])
def test_completions_are_those_of_each_alone_and_each_comes_once(
    kind: str, stop: tuple[str, ...]
) -> None:
    wanted, make, pipeline = requests(stop=stop), Maker(), Pipeline()
    found = completed(runner_with(make, pipeline, kind), pipeline, wanted)
    by_index = sorted(found, key=lambda completion: completion.index)
    assert [outcome(completion) for completion in by_index] == [alone(each) for each in wanted]
    assert [record.completion for record in pipeline.records] == found
    assert threading.get_ident() not in make.threads


def test_few_tokens_are_made_at_once() -> None:
    wanted, make, pipeline = requests(), Maker(), Pipeline()
    completed(runner_with(make, pipeline), pipeline, wanted)
    assert set(make.threads) == {threading.get_ident()}


@pytest.mark.usefixtures("_all_beside")
def test_steps_go_on_while_texts_are_made_and_latencies_leave_that_out() -> None:
    wanted, make, pipeline = requests(), Maker(), Pipeline()
    at_once = completed(runner_with(Maker(), first := Pipeline()), first, wanted)
    make.may_go_on.clear()

    class LetGo(NullLog):
        """The last prompt is admitted, long after the first has ended: now texts may be made."""

        def debug(self, event: str, **_: object) -> None:
            if event == "admitted" and len(pipeline.opened) == len(wanted) - 1:
                make.may_go_on.set()

    runner = runner_with(make, pipeline, log=LetGo())
    found = completed(runner, pipeline, wanted)
    assert {c.request_id: c.latency_s for c in found} == {
        c.request_id: c.latency_s for c in at_once
    }


@pytest.mark.usefixtures("_all_beside")
def test_a_text_that_cannot_be_made_is_an_error_record_of_its_own() -> None:
    wanted, make, pipeline = requests(ignore_eos=True), Maker(), Pipeline()
    make.failing = {tuple(alone(wanted[3])[0])}
    found = completed(runner_with(make, pipeline), pipeline, wanted)
    kinds = {completion.index: completion.error_kind for completion in found}
    assert kinds == {index: "detokenize" if index == 3 else None for index in range(len(wanted))}


@pytest.mark.usefixtures("_all_beside")
def test_what_has_ended_when_the_run_is_stopped_still_comes() -> None:
    wanted, make, pipeline = requests(40), Maker(), Pipeline()
    make.may_go_on.clear()

    class StopsThen(NullLog):
        """Half of the prompts are admitted, the first have ended, and no text is made yet."""

        def debug(self, event: str, **_: object) -> None:
            if event == "admitted" and len(pipeline.opened) == len(wanted) // 2:
                runner.stop()
                make.may_go_on.set()

    runner = runner_with(make, pipeline, log=StopsThen())
    found = completed(runner, pipeline, wanted)
    assert 0 < len(found) < len(wanted)
    assert [outcome(completion) for completion in found] == [
        alone(wanted[completion.index]) for completion in found
    ]


@pytest.mark.usefixtures("_all_beside")
def test_a_call_that_is_left_early_forgets_texts_that_come_later() -> None:
    wanted, make, pipeline = requests(), Maker(), Pipeline()
    runner = runner_with(make, pipeline)

    async def run() -> list[Completion]:
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            giving = tasks.create_task(pipeline.give_back())
            async with aclosing(runner.generate(wanted)) as running:
                first = [await anext(running)]
            await runner.drain()
            giving.cancel()
            return first

    (first,) = asyncio.run(run())
    assert outcome(first) == alone(wanted[first.index])


@pytest.mark.usefixtures("_all_beside")
def test_a_bug_of_the_tokenizer_ends_the_call() -> None:
    pipeline = Pipeline()

    def fail(_: Sequence[Sequence[int]]) -> Texts:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as raised:
        completed(runner_with(cast("Maker", fail), pipeline), pipeline, requests())
    assert raised.group_contains(ZeroDivisionError)
