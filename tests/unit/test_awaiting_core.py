"""The oracle `AwaitingCore` against a simulated pipeline: random events, real page contents."""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mpipipe.control_plane.messages import StepScheduled
from mpipipe.scheduler.instructions import Closed, Finished, SchedulerStatistics, TokensEmitted
from mpipipe.types import FinishReason, Request, SamplingParams
from tests.oracles.awaiting_core import AwaitingCore, Instruction

VOCAB = 24
EOS = 0


def next_token(prefix: list[int], seed: int) -> int:
    """The fake model: any change of any earlier token changes what follows."""
    return zlib.crc32(bytes(prefix), seed) % VOCAB


@dataclass(frozen=True)
class Case:
    num_slots: int
    max_sequences_per_slot: int
    max_tokens_per_step: int
    num_pages: int
    page_size: int
    max_context_tokens: int
    requests: tuple[Request, ...]
    seed: int  # of arrivals and delays
    cancel: tuple[int, ...] = ()  # requests that are cancelled at a random moment
    restart_tokens: int = 0  # known tokens with which a sequence starts over

    def rotary_len(self, request: Request, num_tokens: int) -> int:
        """What every page of a sequence of so many known tokens must have been written with."""
        num_prompt_tokens = len(request.prompt_ids)
        if num_prompt_tokens < self.restart_tokens <= num_tokens:
            return self.restart_tokens
        return num_prompt_tokens

    def core(self) -> AwaitingCore:
        return AwaitingCore(
            num_slots=self.num_slots,
            max_sequences_per_slot=self.max_sequences_per_slot,
            max_tokens_per_step=self.max_tokens_per_step,
            num_pages=self.num_pages,
            page_size=self.page_size,
            max_context_tokens=self.max_context_tokens,
            eos_token_ids=(EOS,),
            restart_tokens=self.restart_tokens,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    page_size = draw(st.integers(1, 5))
    num_pages = draw(st.integers(4, 24))
    limit = min(page_size * num_pages, draw(st.integers(6, 60)))
    max_sequences = draw(st.integers(1, 6))
    requests = []
    for index in range(draw(st.integers(1, 14))):
        prompt = draw(st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=min(20, limit - 1)))
        sampling = SamplingParams(
            max_new_tokens=draw(st.integers(1, 30)),
            seed=index,
            ignore_eos=draw(st.booleans()),
            stop_token_ids=draw(st.sampled_from([(), (1,), (2, 3)])),
            temperature=draw(st.sampled_from([0.0, 0.0, 0.0, 0.7])),  # which the fake model ignores
        )
        requests.append(Request(f"r{index}", index, tuple(prompt), sampling))
    return Case(
        num_slots=draw(st.integers(1, 4)),
        max_sequences_per_slot=max_sequences,
        max_tokens_per_step=draw(st.integers(max_sequences, 24)),
        num_pages=num_pages,
        page_size=page_size,
        max_context_tokens=limit,
        requests=tuple(requests),
        seed=draw(st.integers(0, 2**16)),
        restart_tokens=draw(st.sampled_from([0, 0, *range(2, 40, 3)])),
    )


@dataclass
class Stages:
    """What the stages know: page tables, token histories, and the contents of the pages."""

    case: Case
    memory: list[tuple[int, int] | None] = field(default_factory=list)  # (token, rotary length)
    rotary_lens: dict[int, int] = field(default_factory=dict)
    reopened: dict[int, list[tuple[int, tuple[int, ...], int]]] = field(default_factory=dict)
    requests: dict[int, Request] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)
    histories: dict[int, list[int]] = field(default_factory=dict)

    def open(self, sequence_id: int, request: Request) -> None:
        assert sequence_id not in self.requests
        self.requests[sequence_id] = request
        self.histories[sequence_id] = list(request.prompt_ids)
        self.rotary_lens[sequence_id] = len(request.prompt_ids)

    def reopen(self, core: AwaitingCore, step: StepScheduled) -> None:
        """Tell of the sequences that start over with `step`; they hear it when they run it."""
        for sequence_id in (s.sequence_id for s in step.sequences if not s.num_computed):
            message = sequence_id, core.known_tokens(sequence_id), core.rotary_len(sequence_id)
            self.reopened.setdefault(step.step, []).append(message)

    def run(self, step: StepScheduled) -> tuple[int, ...]:
        """Write the step's tokens into their pages, then sample from what the pages hold."""
        size = self.case.page_size
        for sequence_id, known, rotary_len in self.reopened.pop(step.step, ()):
            assert self.histories[sequence_id] == list(known)
            self.rotary_lens[sequence_id] = rotary_len
        for scheduled in step.sequences:
            if scheduled.num_computed == 0:
                self.tables[scheduled.sequence_id] = []
            table = self.tables[scheduled.sequence_id]
            table.extend(scheduled.new_pages)
            history = self.histories[scheduled.sequence_id]
            end = scheduled.num_computed + scheduled.num_tokens
            assert (len(table) - 1) * size < end <= len(table) * size, "exactly the pages needed"
            assert end <= len(history), "only known tokens are scheduled"
            assert scheduled.sample == (end == len(history))
            for position in range(scheduled.num_computed, end):
                cell = history[position], self.rotary_lens[scheduled.sequence_id]
                self.memory[table[position // size] * size + position % size] = cell
        ids = []
        for scheduled in step.sequences:
            if scheduled.sample:
                table = self.tables[scheduled.sequence_id]
                history = self.histories[scheduled.sequence_id]
                cells = [table[p // size] * size + p % size for p in range(len(history))]
                cached = [self.memory[cell] for cell in cells]
                request = self.requests[scheduled.sequence_id]
                begun = self.case.rotary_len(request, len(history))
                wanted = [(token, begun) for token in history]
                assert cached == wanted, "a page was overwritten, or should have been"
                ids.append(next_token(history, request.sampling.seed))
        return tuple(ids)

    def learn(self, step: StepScheduled, ids: tuple[int, ...]) -> None:
        sampled = [s.sequence_id for s in step.sequences if s.sample]
        for sequence_id, token_id in zip(sampled, ids, strict=True):
            self.histories[sequence_id].append(token_id)

    def close(self, closed: Closed) -> None:
        for sequence_id in closed.sequence_ids:
            del self.requests[sequence_id]
            del self.histories[sequence_id], self.rotary_lens[sequence_id]
            self.tables.pop(sequence_id, None)


@dataclass
class Outcome:
    tokens: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, FinishReason] = field(default_factory=dict)
    steps: list[StepScheduled] = field(default_factory=list)
    statistics: SchedulerStatistics | None = None


@dataclass
class Simulation:
    """Feeds the core; checks what must hold at every moment."""

    case: Case
    outcome: Outcome = field(default_factory=Outcome)

    def run(self) -> Outcome:
        case, random = self.case, Random(self.case.seed)
        core, stages = case.core(), Stages(case, [None] * (case.num_pages * case.page_size))
        arrivals, flight = deque(case.requests), deque[StepScheduled]()
        to_cancel = list(case.cancel)
        for _ in range(20_000):
            if not arrivals and core.is_idle:
                break
            choice = random.random()
            if arrivals and (choice < 0.3 or not flight):
                request = arrivals.popleft()
                stages.open(core.add(request), request)
                self.outcome.tokens[request.request_id] = []
            elif to_cancel and choice > 0.9:
                self.obey(core.stop(to_cancel.pop(), FinishReason.ERROR), stages)
            elif flight and choice < 0.8:
                step = flight.popleft()
                ids = stages.run(step)  # as late as possible: pages may have changed hands since
                stages.learn(step, ids)
                self.obey(core.sampled(step.step, ids), stages)
            if random.random() < 0.8 or not flight:
                self.dispatch(core, flight, stages)
            self.check(core, flight, arrivals)
        assert core.is_idle, "no progress"
        assert not stages.requests, "every sequence is closed"
        self.outcome.statistics = core.statistics()
        return self.outcome

    def dispatch(self, core: AwaitingCore, flight: deque[StepScheduled], stages: Stages) -> None:
        while (step := core.next_step()) is not None:
            assert step.num_tokens <= self.case.max_tokens_per_step
            assert len(step.sequences) <= self.case.max_sequences_per_slot
            sizes = [s.num_tokens > 1 for s in step.sequences]
            assert sizes == sorted(sizes), "decodes first"
            if step.steady:
                assert all(s.num_tokens == 1 and s.sample for s in step.sequences)
            awaited = {s.sequence_id for other in flight for s in other.sequences if s.sample}
            assert not awaited & {s.sequence_id for s in step.sequences}
            assert not any(other.slot == step.slot and other.num_sampled for other in flight)
            stages.reopen(core, step)
            flight.append(step)
            self.outcome.steps.append(step)

    def check(
        self, core: AwaitingCore, flight: deque[StepScheduled], arrivals: deque[Request]
    ) -> None:
        assert len(flight) <= self.case.num_slots
        statistics = core.statistics()
        assert statistics.num_steps_in_flight == len(flight)
        assert statistics.num_waiting + statistics.num_running + statistics.num_finished == len(
            self.case.requests
        ) - len(arrivals)
        if not statistics.num_running:
            assert statistics.num_free_pages == self.case.num_pages

    def obey(self, instructions: list[Instruction], stages: Stages) -> None:
        outcome = self.outcome
        for instruction in instructions:
            match instruction:
                case TokensEmitted():
                    ((sequence_id,), (token_id,)) = instruction.sequence_ids, instruction.token_ids
                    request_id = stages.requests[sequence_id].request_id
                    assert request_id not in outcome.reasons
                    outcome.tokens[request_id].append(token_id)
                case Finished():
                    request_id = stages.requests[instruction.sequence_id].request_id
                    assert request_id not in outcome.reasons, "finished twice"
                    outcome.reasons[request_id] = instruction.reason
                case Closed():
                    stages.close(instruction)


def alone(case: Case, request: Request) -> tuple[list[int], FinishReason]:
    """The same completion from a plain loop over one sequence."""
    tokens = list(request.prompt_ids)
    limit = min(case.max_context_tokens, case.num_pages * case.page_size)
    stops = set(request.sampling.stop_token_ids)
    if not request.sampling.ignore_eos:
        stops.add(EOS)
    while True:
        tokens.append(next_token(tokens, request.sampling.seed))
        output = tokens[len(request.prompt_ids) :]
        if tokens[-1] in stops:
            return output, FinishReason.STOP
        if len(output) == request.sampling.max_new_tokens or len(tokens) == limit:
            return output, FinishReason.LENGTH


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_every_request_gets_the_tokens_it_would_get_alone(case: Case) -> None:
    outcome = Simulation(case).run()
    assert outcome.statistics is not None
    event(f"preempted: {outcome.statistics.num_preemptions > 0}")
    assert outcome.statistics.num_free_pages == case.num_pages
    assert list(outcome.tokens) == [request.request_id for request in case.requests]
    for request in case.requests:
        tokens, reason = alone(case, request)
        assert outcome.tokens[request.request_id] == tokens
        assert outcome.reasons[request.request_id] is reason


@settings(max_examples=50, deadline=None, derandomize=True)
@given(cases())
def test_equal_events_give_equal_steps(case: Case) -> None:
    assert Simulation(case).run().steps == Simulation(case).run().steps


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases(), st.data())
def test_cancelled_requests_end_once_and_the_others_are_not_touched(
    case: Case, data: st.DataObject
) -> None:
    indices = st.lists(st.integers(0, len(case.requests) - 1), max_size=5)
    case = replace(case, cancel=tuple(data.draw(indices)))
    outcome = Simulation(case).run()
    assert len(outcome.reasons) == len(case.requests)
    for request in case.requests:
        tokens, reason = alone(case, request)
        got = outcome.tokens[request.request_id]
        if outcome.reasons[request.request_id] is FinishReason.ERROR:
            assert request.index in case.cancel
            assert got == tokens[: len(got)]
        else:
            assert (got, outcome.reasons[request.request_id]) == (tokens, reason)


@pytest.mark.parametrize("restart_tokens", [0, 7, 15])
def test_the_cases_reach_heavy_preemption(restart_tokens: int) -> None:
    requests = tuple(
        Request(f"r{i}", i, tuple(range(1, 7)), SamplingParams(max_new_tokens=24, ignore_eos=True))
        for i in range(12)
    )
    case = Case(
        num_slots=2,
        max_sequences_per_slot=6,
        max_tokens_per_step=16,
        num_pages=20,
        page_size=2,
        max_context_tokens=60,
        requests=requests,
        seed=1,
        restart_tokens=restart_tokens,
    )
    outcome = Simulation(case).run()
    assert outcome.statistics is not None
    assert outcome.statistics.num_preemptions > 10
    assert [outcome.tokens[r.request_id] for r in requests] == [alone(case, r)[0] for r in requests]
