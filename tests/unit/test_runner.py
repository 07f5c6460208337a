"""The runner with the core in each mode; the pipeline gives its steps back one at a time."""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, cast

import pytest

from mpipipe.clock import ScriptedClock
from mpipipe.control_plane.group import RankGroup
from mpipipe.control_plane.mailbox import Mailbox
from mpipipe.control_plane.messages import (
    DecodeScheduled,
    LogprobsSampled,
    Message,
    PagesRestored,
    PagesSaved,
    RequestClosed,
    RequestOpened,
    StepSampled,
    StepScheduled,
)
from mpipipe.errors import PromptError
from mpipipe.metrics.lines import RequestRecord
from mpipipe.metrics.log import Logger, NullLog
from mpipipe.scheduler.core import SchedulerCore, SchedulerLimits
from mpipipe.scheduler.detokenize import SpecialTokens, StopWatch
from mpipipe.scheduler.drafts import agreed
from mpipipe.scheduler.runner import Runner
from mpipipe.scheduler.sequence import Sequence as Sequence_
from mpipipe.scheduler.texts import TextMaker
from mpipipe.types import Completion, FinishReason, Request, SamplingParams, TokenLogprobs

EOS = 0
T = TypeVar("T")
PLAIN = ("awaiting", "phases", "mixed")
CORES = (*PLAIN, "drafting")


def decode(ids: Sequence[int]) -> str:
    """Every id is a letter but EOS, which is no text."""
    return "".join(chr(ord("a") + i - 1) for i in ids if i != EOS)


def next_id(history: Sequence[int], seed: int) -> int:
    """The model."""
    return zlib.crc32(bytes(history), seed) % 27


class Foreteller:
    """Drafts three tokens; the last is wrong."""

    max_rows = 16
    max_sequences = 4
    alone = False

    def expects_gain(self, sequences: Sequence[Sequence_]) -> bool:
        return len(sequences) > 0

    def propose(
        self, sequences: Sequence[Sequence_], rooms: Sequence[int]
    ) -> list[tuple[int, ...]]:
        drafts = []
        for sequence, room in zip(sequences, rooms, strict=True):
            text = list(sequence.tokens)
            for _ in range(min(3, room)):
                text.append(next_id(text, sequence.request.sampling.seed))
            drafts.append((*text[len(sequence.tokens) : -1], text[-1] ^ 1) if room > 0 else ())
        return drafts if any(drafts) else []


def make_core(
    kind: str, *, num_slots: int = 2, num_pages: int = 1000, num_host_pages: int = 0
) -> SchedulerCore:
    lookahead = 0 if kind == "awaiting" else 1
    limits = SchedulerLimits(
        num_slots, 4, 16, num_pages, 4, 200, lookahead, num_host_pages=num_host_pages
    )
    prefill: Literal["phases", "mixed"] = "phases" if kind == "phases" else "mixed"
    drafter = Foreteller() if kind == "drafting" else None
    return SchedulerCore(limits, eos_token_ids=(EOS,), prefill=prefill, drafter=drafter)


@dataclass
class Pipeline:
    """Mesh and stages in one: computes a step when it is sent, gives it back when asked."""

    clock: ScriptedClock = field(default_factory=ScriptedClock)
    mailboxes: dict[type, Mailbox[tuple[int, Message]]] = field(default_factory=dict)
    histories: dict[int, list[int]] = field(default_factory=dict)
    computed: dict[int, int] = field(default_factory=dict)
    sampling: dict[int, SamplingParams] = field(default_factory=dict)
    batches: dict[int, list[int]] = field(default_factory=dict)
    finished: deque[tuple[StepSampled, LogprobsSampled | None]] = field(default_factory=deque)
    sent: list[Message] = field(default_factory=list)
    opened: list[RequestOpened] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)
    most_in_flight: int = 0
    records: list[RequestRecord] = field(default_factory=list)
    log: Logger = field(default_factory=NullLog)
    rank = 0

    def mailbox(self, *kinds: type[Message]) -> Mailbox[tuple[int, Message]]:
        mailbox = self.mailboxes.setdefault(kinds[0], Mailbox(kinds[0].__name__))
        self.mailboxes.update(dict.fromkeys(kinds, mailbox))
        return mailbox

    def broadcast_message(self, message: Message) -> None:
        self.sent.append(message)
        match message:
            case RequestOpened():
                self.opened.append(message)
                self.histories[message.sequence_id] = list(message.prompt_ids)
                self.sampling[message.sequence_id] = message.sampling
            case RequestClosed():
                self.closed.extend(message.sequence_ids)
            case StepScheduled():
                self.run(message.step, [s.sequence_id for s in message.sequences if s.sample])
            case DecodeScheduled():
                rows = self.batches.setdefault(message.slot, [])
                for row in reversed(message.left):
                    del rows[row]
                rows.extend(message.joined)
                if message.verified:
                    self.verify(message)
                    return
                self.run(message.step, rows + [c.sequence_id for c in message.chunks if c.sample])

    def run(self, step: int, sampled: Sequence[int]) -> None:
        ids = []
        for sequence_id in sampled:
            history = self.histories[sequence_id]
            ids.append(next_id(history, self.sampling[sequence_id].seed))
            history.append(ids[-1])
        asked = [self.sampling[sequence_id].num_logprobs >= 0 for sequence_id in sampled]
        logprobs = None
        if any(asked):
            entries = [
                TokenLogprobs(i, -1.0) if a else None for i, a in zip(ids, asked, strict=True)
            ]
            logprobs = LogprobsSampled(step, tuple(entries))
        self.finished.append((StepSampled(step, tuple(ids)), logprobs))
        self.most_in_flight = max(self.most_in_flight, len(self.finished))

    def verify(self, step: DecodeScheduled) -> None:
        ids = []
        for verified in step.verified:
            history, draft = self.histories[verified.sequence_id], verified.token_ids[1:]
            assert len(history) == verified.num_computed + 1
            seed = self.sampling[verified.sequence_id].seed
            sampled = [next_id([*history, *draft[:row]], seed) for row in range(1 + len(draft))]
            history += sampled[: 1 + agreed(draft, sampled)]
            ids += sampled
        self.finished.append((StepSampled(step.step, tuple(ids)), None))

    async def give_back(self) -> None:
        """As long as there are steps: one per turn of the event loop, each taking a second."""
        while True:
            if self.finished:
                self.clock.advance(1.0)
                sampled, logprobs = self.finished.popleft()
                self.mailbox(StepSampled).put((0, sampled))
                if logprobs is not None:
                    await asyncio.sleep(0)
                    self.mailbox(LogprobsSampled).put((0, logprobs))
            await asyncio.sleep(0)

    @asynccontextmanager
    async def running(self, core: SchedulerCore) -> AsyncIterator[Runner]:
        """A runner, and a task that gives its steps back."""
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            task = tasks.create_task(self.give_back())
            yield self.runner(core)
            task.cancel()

    def runner(self, core: SchedulerCore) -> Runner:
        return Runner(
            core=core,
            group=cast("RankGroup", self),
            texts=TextMaker(decode),
            clock=self.clock,
            log=self.log,
            on_request=self.records.append,
        )


class Events(NullLog):
    """A log that keeps its events."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []

    def debug(self, event: str, **fields: Any) -> None:
        self.told.append((event, fields))

    def info(self, event: str, **fields: Any) -> None:
        self.told.append((event, fields))


def requests(count: int = 10, **sampling: object) -> list[Request]:
    params = SamplingParams(max_new_tokens=20).replace(**sampling)
    return [
        Request(f"r{i}", i, tuple(1 + (7 * i + k) % 26 for k in range(1 + 3 * i % 8)), params)
        for i in range(count)
    ]


def complete(
    core: SchedulerCore, wanted: Sequence[Request], pipeline: Pipeline | None = None
) -> list[Completion]:
    pipeline = pipeline or Pipeline()

    async def run() -> list[Completion]:
        async with pipeline.running(core) as runner:
            completions = [c async for c in runner.generate(wanted)]
        assert runner.num_output_tokens == sum(c.num_output_tokens for c in completions)
        return completions

    completions = asyncio.run(run())
    assert core.is_idle
    assert sorted(pipeline.closed) == list(range(len(wanted)))
    return sorted(completions, key=lambda completion: completion.index)


def complete_some(
    core: SchedulerCore, wanted: Sequence[Request], pipeline: Pipeline
) -> list[Completion]:
    """In the order they ended; some may be refused."""

    async def run() -> list[Completion]:
        async with pipeline.running(core) as runner:
            return [completion async for completion in runner.generate(wanted)]

    return asyncio.run(run())


def alone(request: Request) -> tuple[list[int], str, FinishReason]:
    """The completion from a plain loop, its text looked at after every token."""
    history, output = list(request.prompt_ids), list[int]()
    sampling = request.sampling
    watch = StopWatch(decode, sampling.stop)
    while True:
        token = zlib.crc32(bytes(history), sampling.seed) % 27
        history.append(token)
        output.append(token)
        if token == EOS and not sampling.ignore_eos:
            return output, watch.finish(), FinishReason.STOP
        if watch.push(token):
            return output, watch.finish(), FinishReason.STOP
        if len(output) == sampling.max_new_tokens:
            return output, watch.finish(), FinishReason.LENGTH


def outcome(completion: Completion) -> tuple[list[int], str, FinishReason]:
    return list(completion.token_ids), completion.text, completion.finish_reason


def test_the_longest_expected_outputs_start_first_and_equal_ones_as_they_come() -> None:
    limits = (2, 9, 2, 30, 9, 2, 30)
    wanted = [
        replace(request, sampling=request.sampling.replace(max_new_tokens=limit))
        for request, limit in zip(requests(len(limits)), limits, strict=True)
    ]
    pipeline = Pipeline()
    complete(make_core("phases"), wanted, pipeline)
    started = [
        wanted.index(next(r for r in wanted if r.prompt_ids == o.prompt_ids))
        for o in sorted(pipeline.opened, key=lambda opened: opened.sequence_id)
    ]
    assert started == [3, 6, 1, 4, 0, 2, 5]


def test_the_log_tells_each_admission_and_what_page_pressure_undid() -> None:
    events = Events()
    core = make_core("mixed", num_pages=14)
    complete(core, wanted := requests(), Pipeline(log=events))
    admitted = [fields for event, fields in events.told if event == "admitted"]
    preempted = [fields for event, fields in events.told if event == "preempted"]
    again = [fields for fields in admitted if fields["num_output_tokens"]]
    assert len(preempted) == core.statistics().num_preemptions > 0
    assert len(admitted) == len(wanted) + len(preempted)
    assert {fields["request"] for fields in again} <= {fields["request"] for fields in preempted}
    assert all(0 <= fields["num_free_pages"] < 14 for fields in preempted)


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("stop", [(), ("e", "zz", "b")], ids=["plain", "stop strings"])
def test_pages_that_move_are_told_before_the_steps_that_need_them(
    kind: str, stop: tuple[str, ...]
) -> None:
    wanted, events = requests(stop=stop), Events()
    core = make_core(kind, num_pages=14, num_host_pages=60)
    pipeline = Pipeline(log=events)
    completions = complete(core, wanted, pipeline)
    assert [outcome(c) for c in completions] == [alone(request) for request in wanted]
    preempted = [fields for event, fields in events.told if event == "preempted"]
    assert sum(fields["num_saved_pages"] > 0 for fields in preempted) == core.statistics().num_saved
    saved: set[int] = set()
    restored: set[int] = set()
    num_restored = 0
    for message in pipeline.sent:
        match message:
            case PagesSaved():
                saved |= set(message.host_pages)
            case PagesRestored():
                assert set(message.host_pages) <= saved
                saved -= set(message.host_pages)
                restored.add(message.sequence_id)
                num_restored += 1
            case RequestOpened():
                assert message.sequence_id not in restored, "it goes on, and does not start over"
            case RequestClosed():
                restored -= set(message.sequence_ids)
    assert num_restored > 0


@pytest.mark.parametrize("kind", CORES)
@pytest.mark.parametrize("stop", [(), ("e", "zz", "b")], ids=["plain", "stop strings"])
@pytest.mark.parametrize("num_pages", [1000, 14], ids=["many pages", "few pages"])
def test_completions_are_those_of_each_request_alone(
    kind: str, stop: tuple[str, ...], num_pages: int
) -> None:
    wanted = requests(stop=stop)
    # Also next to each other: with stop strings, and without.
    wanted[4] = replace(wanted[4], sampling=wanted[4].sampling.replace(stop=(), ignore_eos=True))
    core = make_core(kind, num_pages=num_pages)
    completions = complete(core, wanted)
    assert [outcome(c) for c in completions] == [alone(request) for request in wanted]
    assert (core.statistics().num_preemptions > 0) == (num_pages == 14)


def test_the_requests_end_in_every_way() -> None:
    reasons = [alone(request)[2] for request in requests()]
    assert set(reasons) == {FinishReason.STOP, FinishReason.LENGTH}
    with_stops = [alone(request) for request in requests(stop=("e", "zz", "b"))]
    assert any(len(a[0]) < len(alone(b)[0]) for a, b in zip(with_stops, requests(), strict=True)), (
        "a stop string ends one"
    )


@pytest.mark.parametrize("kind", CORES)
def test_log_probabilities_go_to_those_who_asked(kind: str) -> None:
    wanted = requests()
    for index in (1, 6):
        wanted[index] = replace(
            wanted[index], sampling=wanted[index].sampling.replace(num_logprobs=0)
        )
    for completion in complete(make_core(kind), wanted):
        if completion.index in (1, 6):
            assert completion.logprobs is not None
            assert [p.token_id for p in completion.logprobs] == list(completion.token_ids)
        else:
            assert completion.logprobs is None


@pytest.mark.parametrize("kind", CORES)
def test_a_prompt_that_can_never_run_is_refused_and_the_others_run(kind: str) -> None:
    wanted = [replace(requests(1)[0], prompt_ids=(1,) * 500), requests(2)[1]]

    async def run() -> list[Completion]:
        async with Pipeline().running(make_core(kind)) as runner:
            return [c async for c in runner.generate(wanted)]

    rejected, done = asyncio.run(run())
    assert (rejected.index, rejected.error_kind) == (0, "too_long")
    assert outcome(done) == alone(wanted[1])


@pytest.mark.parametrize("kind", CORES)
def test_stages_are_told_of_a_request_with_its_first_step(kind: str) -> None:
    pipeline = Pipeline()
    wanted = requests(3)
    complete(make_core(kind), wanted, pipeline)
    opened = sorted((m.sequence_id, m.prompt_ids) for m in pipeline.opened)
    assert opened == [(index, request.prompt_ids) for index, request in enumerate(wanted)]


@pytest.mark.parametrize("kind", CORES)
def test_stages_are_told_all_tokens_of_a_sequence_that_starts_over(kind: str) -> None:
    pipeline = Pipeline()
    core = make_core(kind, num_pages=14)
    wanted = requests()
    complete(core, wanted, pipeline)
    assert len(pipeline.opened) > len(wanted)
    again = pipeline.opened[-1]
    prompt = wanted[again.sequence_id].prompt_ids
    tokens = (*prompt, *alone(wanted[again.sequence_id])[0])
    assert any(len(m.prompt_ids) > len(wanted[m.sequence_id].prompt_ids) for m in pipeline.opened)
    assert again.prompt_ids == tokens[: len(again.prompt_ids)]
    for message in pipeline.opened:
        num_prompt_tokens = len(wanted[message.sequence_id].prompt_ids)
        assert message.num_output_tokens == len(message.prompt_ids) - num_prompt_tokens


@pytest.mark.parametrize(("kind", "most"), [("awaiting", 2), ("phases", 4), ("mixed", 4)])
def test_as_many_steps_are_in_flight_as_the_core_allows(kind: str, most: int) -> None:
    pipeline = Pipeline()
    complete(make_core(kind), requests(), pipeline)
    assert pipeline.most_in_flight == most


@pytest.mark.parametrize("kind", PLAIN)
def test_times_are_those_of_first_step_first_token_and_last_token(kind: str) -> None:
    wanted = requests(1, ignore_eos=True, max_new_tokens=5)
    (completion,) = complete(make_core(kind), wanted)
    assert completion.queue_s == 0.0
    assert completion.ttft_s == 1.0
    assert completion.latency_s == 5.0  # a second a step


@pytest.mark.parametrize("kind", PLAIN)
def test_the_life_of_each_request_is_told_once(kind: str) -> None:
    core, pipeline = make_core(kind, num_pages=14), Pipeline()
    pipeline.clock.advance(100.0)
    wanted = requests(stop=("e",))
    wanted[7] = replace(wanted[7], prompt_ids=(1,) * 500)
    completions = complete_some(core, wanted, pipeline)
    assert [record.completion for record in pipeline.records] == completions
    refused = pipeline.records[0]
    assert refused.completion.error_kind == "too_long"
    assert (refused.slot, refused.arrived_s, refused.token_s) == (None, None, ())
    for record in pipeline.records[1:]:
        done = record.completion
        assert record.slot in (0, 1)
        assert record.arrived_s == 100.0
        assert record.admitted_s == 100.0 + done.queue_s
        assert len(record.token_s) == done.num_output_tokens
        assert record.token_s[0] == 100.0 + done.ttft_s
        assert record.finished_s == 100.0 + done.latency_s >= record.token_s[-1]
        assert min(record.gaps_s(), default=1.0) >= 1.0, "a second a step"
    num_preemptions = sum(record.num_preemptions for record in pipeline.records)
    assert num_preemptions == core.statistics().num_preemptions > 0


@pytest.mark.parametrize("kind", CORES)
def test_what_is_unfinished_is_drained_when_the_caller_leaves(kind: str) -> None:
    core, pipeline = make_core(kind), Pipeline()

    async def run() -> None:
        async with pipeline.running(core) as runner:
            async with aclosing(runner.generate(requests(stop=("zz",)))) as completions:
                await anext(completions)
            assert not core.is_idle
            await runner.drain()

    asyncio.run(run())
    assert core.is_idle
    assert not pipeline.finished
    assert len(pipeline.closed) == len(set(pipeline.closed)) == 10


@pytest.mark.parametrize("kind", CORES)
def test_the_next_steps_are_sent_before_a_completion_is_given_out(kind: str) -> None:
    core, pipeline = make_core(kind), Pipeline()

    async def run() -> None:
        async with pipeline.running(core) as runner:
            async with aclosing(runner.generate(requests())) as completions:
                await anext(completions)
                assert core.next_step() is None
                assert core.statistics().num_steps_in_flight > 0
            await runner.drain()

    asyncio.run(run())


@pytest.mark.parametrize("kind", CORES)
def test_a_runner_that_is_stopped_gives_out_what_is_whole_and_leaves_nothing_behind(
    kind: str,
) -> None:
    core, pipeline = make_core(kind), Pipeline()
    wanted = requests(ignore_eos=True)

    async def run() -> list[Completion]:
        done = []
        async with pipeline.running(core) as runner:
            async for completion in runner.generate(wanted):
                done.append(completion)
                runner.stop()
        return done

    done = asyncio.run(run())
    assert 1 <= len(done) < len(wanted)
    assert all(outcome(c) == alone(wanted[c.index]) for c in done)
    assert core.is_idle
    assert not pipeline.finished


@pytest.mark.parametrize("kind", CORES)
def test_a_runner_that_was_stopped_before_sends_nothing(kind: str) -> None:
    core, pipeline = make_core(kind), Pipeline()

    async def run() -> list[Completion]:
        async with pipeline.running(core) as runner:
            runner.stop()
            return [completion async for completion in runner.generate(requests())]

    assert asyncio.run(run()) == []
    assert core.is_idle
    assert not pipeline.opened


# ---- special tokens and tokenizers that fail -----------------------------------------------------


def complete_with(
    runner: Runner, core: SchedulerCore, pipeline: Pipeline, wanted: Sequence[Request]
) -> list[Completion]:
    async def run() -> list[Completion]:
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            task = tasks.create_task(pipeline.give_back())
            completions = [c async for c in runner.generate(wanted)]
            task.cancel()
        return completions

    completions = asyncio.run(run())
    assert core.is_idle
    return sorted(completions, key=lambda completion: completion.index)


def runner_of(
    core: SchedulerCore,
    pipeline: Pipeline,
    *,
    special: int | None = None,
    failing: int | None = None,
) -> Runner:
    """Its tokenizer skips the id `special`, and fails on ids that have `failing` among them."""

    def decode_or_fail(ids: Sequence[int]) -> str:
        if failing in ids:
            raise PromptError("detokenize", f"no text for {failing}: copy the tokenizer again")
        return decode([i for i in ids if i != special])

    return Runner(
        core=core,
        group=cast("RankGroup", pipeline),
        texts=TextMaker(
            decode_or_fail, special=SpecialTokens({} if special is None else {"<|x|>": special})
        ),
        clock=pipeline.clock,
        log=NullLog(),
    )


@pytest.mark.parametrize("kind", CORES)
def test_a_stop_string_with_a_special_token_ends_the_text_before_it(kind: str) -> None:
    (request,) = requests(1, ignore_eos=True)
    tokens, _, _ = alone(request)
    place = 4
    before, special = decode(tokens[place - 1 : place]), tokens[place]
    stopping = replace(request, sampling=request.sampling.replace(stop=(f"{before}<|x|>",)))
    core, pipeline = make_core(kind), Pipeline()
    (found,) = complete_with(runner_of(core, pipeline, special=special), core, pipeline, [stopping])
    assert list(found.token_ids) == tokens[: place + 1]
    assert found.text == decode([i for i in tokens[: place - 1] if i != special])
    assert found.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("kind", CORES)
@pytest.mark.parametrize("stop", [(), ("no such text",)], ids=["plain", "stop strings"])
def test_a_tokenizer_that_fails_on_one_completion_takes_no_other(
    kind: str, stop: tuple[str, ...]
) -> None:
    wanted = requests(stop=stop, ignore_eos=True)
    outcomes = [alone(request) for request in wanted]
    failing = outcomes[0][0][2]
    fails = [failing in tokens for tokens, _, _ in outcomes]
    assert any(fails)
    assert not all(fails)
    core, pipeline = make_core(kind), Pipeline()
    completions = complete_with(runner_of(core, pipeline, failing=failing), core, pipeline, wanted)
    assert [c.error_kind for c in completions] == ["detokenize" if f else None for f in fails]
    for completion, expected, failed in zip(completions, outcomes, fails, strict=True):
        assert failed or outcome(completion) == expected
