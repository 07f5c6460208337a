"""The scheduler against a simulated pipeline: messages run in order, late, with real pages.

The oracle is each request alone, and `AwaitingCore` on the same requests.
"""

from __future__ import annotations

import zlib
from collections import Counter, deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mpipipe.control_plane.messages import (
    DecodeScheduled,
    PagesRestored,
    PagesSaved,
    RequestClosed,
    RequestOpened,
    ScheduledSequence,
    StepScheduled,
    VerifiedSequence,
)
from mpipipe.kv_cache.shared_pages import KnownPage
from mpipipe.scheduler.core import SchedulerCore, SchedulerLimits
from mpipipe.scheduler.drafts import agreed
from mpipipe.scheduler.instructions import (
    Closed,
    Finished,
    Instruction,
    SchedulerStatistics,
    TokensEmitted,
)
from mpipipe.scheduler.sequence import Sequence
from mpipipe.types import FinishReason, Request, SamplingParams
from tests.oracles.awaiting_core import AwaitingCore
from tests.unit.test_awaiting_core import EOS, VOCAB, Case, Simulation, alone, cases, next_token

Step = StepScheduled | DecodeScheduled
Move = PagesSaved | PagesRestored
PREFILL = ("phases", "mixed")


@dataclass(frozen=True)
class AheadCase:
    case: Case
    lookahead: int
    mixed: bool
    stop_at: dict[int, int] = field(default_factory=dict)  # request → token of its "stop string"
    num_host_pages: int = 0
    min_saved_tokens: int = 1
    drafts: int = 0  # seed of the drafts; 0: there are none
    shares: bool = False

    @property
    def max_sharing_tokens(self) -> int:
        """Sequences that begin shorter than the restart see equal rotary frequencies."""
        if not self.shares:
            return 0
        return self.case.restart_tokens - 1 if self.case.restart_tokens else 1000

    def core(self) -> SchedulerCore:
        case = self.case
        limits = SchedulerLimits(
            num_slots=case.num_slots,
            max_sequences_per_slot=case.max_sequences_per_slot,
            max_tokens_per_step=case.max_tokens_per_step,
            num_pages=case.num_pages,
            page_size=case.page_size,
            max_context_tokens=case.max_context_tokens,
            lookahead=self.lookahead,
            num_host_pages=self.num_host_pages,
            min_saved_tokens=self.min_saved_tokens,
            max_sharing_tokens=self.max_sharing_tokens,
        )
        return SchedulerCore(
            limits,
            eos_token_ids=(EOS,),
            prefill="mixed" if self.mixed else "phases",
            restart_tokens=case.restart_tokens,
            drafter=ScriptedDrafter(self.drafts) if self.drafts else None,
        )

    def expected(self, request: Request) -> tuple[list[int], FinishReason]:
        tokens, reason = alone(self.case, request)
        stop = self.stop_at.get(request.index)
        if stop in tokens:
            # A token that ends the sequence anyway comes before its text is looked at.
            tokens = tokens[: tokens.index(stop) + 1]
            reason = reason if len(tokens) == len(alone(self.case, request)[0]) else STOP
        return tokens, reason


STOP = FinishReason.STOP


class ScriptedDrafter:
    """Drafts that are right now and then, in part or as a whole, whatever the text."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self.max_rows = self._random.randint(2, 20)
        self.max_sequences = self._random.randint(1, 4)
        self.alone = self._random.random() < 0.3

    def expects_gain(self, sequences: SequenceOf[Sequence]) -> bool:
        assert 0 < len(sequences) <= self.max_sequences
        return self._random.random() < 0.6

    def propose(
        self, sequences: SequenceOf[Sequence], rooms: SequenceOf[int]
    ) -> list[tuple[int, ...]]:
        assert 0 < len(sequences) <= self.max_sequences
        if self._random.random() < 0.3:
            return []
        left = self.max_rows - len(sequences)
        drafts = []
        for sequence, room in zip(sequences, rooms, strict=True):
            assert room >= 0
            draft: list[int] = []
            for _ in range(self._random.randint(0, max(0, min(left, room, 6)))):
                right = next_token([*sequence.tokens, *draft], sequence.request.sampling.seed)
                draft.append(right if self._random.random() < 0.8 else right ^ 1)
            left -= len(draft)
            drafts.append(tuple(draft))
        return drafts


def step_chunks(step: Step) -> tuple[ScheduledSequence, ...]:
    """The prompts in a step."""
    return step.sequences if isinstance(step, StepScheduled) else step.chunks


def verified_in(step: Step) -> tuple[VerifiedSequence, ...]:
    """The sequences in a step that have rows for drafts."""
    return step.verified if isinstance(step, DecodeScheduled) else ()


@st.composite
def ahead_cases(draw: st.DrawFn) -> AheadCase:
    case = draw(cases())
    return AheadCase(
        case,
        lookahead=draw(st.sampled_from([0, 0, 1, 1, 2, 3])),
        mixed=draw(st.booleans()),
        stop_at=draw(st.dictionaries(st.integers(0, 13), st.integers(1, 23), max_size=4)),
        num_host_pages=draw(st.sampled_from([0, 2, 6, 50])),
        min_saved_tokens=draw(st.sampled_from([1, 1, 5])),
        drafts=draw(st.sampled_from([0, 1, 2, 3, 4])),
    )


@st.composite
def sharing_cases(draw: st.DrawFn) -> AheadCase:
    """Prompts that begin as one of two texts do, for some tokens."""
    ahead = draw(ahead_cases())
    texts = [draw(st.lists(st.integers(1, 3), min_size=20, max_size=20)) for _ in range(2)]
    requests = []
    for request in ahead.case.requests:
        text, num_common = draw(st.sampled_from(texts)), draw(st.integers(0, 20))
        own = draw(st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=4))
        prompt = (*text[:num_common], *own)[: ahead.case.max_context_tokens - 1]
        requests.append(replace(request, prompt_ids=prompt))
    return replace(ahead, case=replace(ahead.case, requests=tuple(requests)), shares=True)


@dataclass
class Stage:
    """What a stage does: request rows, batches by deltas, page tables, and the contents of the
    pages."""

    case: Case
    max_sharing_tokens: int = 0
    # (whose, token, rotary length)
    memory: list[tuple[int, int, int] | None] = field(default_factory=list)
    host_memory: dict[int, list[tuple[int, int, int] | None]] = field(default_factory=dict)
    rotary_lens: dict[int, int] = field(default_factory=dict)
    sampling: dict[int, SamplingParams] = field(default_factory=dict)
    histories: dict[int, list[int]] = field(default_factory=dict)  # with all that is sampled
    computed: dict[int, int] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)
    batches: list[list[int]] = field(default_factory=list)

    def follow(self, message: RequestOpened | RequestClosed | Move | Step) -> tuple[int, ...]:
        match message:
            case PagesSaved():
                for page, host_page in zip(message.pages, message.host_pages, strict=True):
                    self.host_memory[host_page] = self.memory[self.cells(page)]
            case PagesRestored():
                sequence_id = message.sequence_id
                assert self.computed[sequence_id] == message.num_computed > 0
                self.tables[sequence_id] = list(message.pages)
                copied = message.pages[len(message.pages) - len(message.host_pages) :]
                for page, host_page in zip(copied, message.host_pages, strict=True):
                    self.memory[self.cells(page)] = self.host_memory.pop(host_page)
            case RequestOpened():
                sequence_id = message.sequence_id
                if sequence_id in self.histories:
                    assert tuple(self.histories[sequence_id]) == message.prompt_ids
                self.sampling[sequence_id] = message.sampling
                self.histories[sequence_id] = list(message.prompt_ids)
                self.rotary_lens[sequence_id] = message.rotary_len
                self.computed[sequence_id], self.tables[sequence_id] = 0, []
                places = self.case.num_slots * self.case.max_sequences_per_slot
                assert len(self.histories) <= 2 * places, "two request_rows a place"
            case RequestClosed():
                for sequence_id in message.sequence_ids:
                    self.sampling.pop(sequence_id, None)
                    self.histories.pop(sequence_id, None)
            case StepScheduled():
                return self.prefill(message.sequences)
            case DecodeScheduled():
                return self.decode(message)
        return ()

    def prefill(self, chunks: tuple[ScheduledSequence, ...]) -> tuple[int, ...]:
        for chunk in chunks:
            sequence_id = chunk.sequence_id
            if not self.computed[sequence_id]:  # it begins, behind what others have computed
                assert chunk.num_computed % self.case.page_size == 0
                self.computed[sequence_id] = chunk.num_computed
            assert self.computed[sequence_id] == chunk.num_computed
            self.tables[sequence_id].extend(chunk.new_pages)
            for _ in range(chunk.num_tokens):
                self.compute(sequence_id)
            history = self.histories[sequence_id]
            assert chunk.sample == (self.computed[sequence_id] == len(history))
        return tuple(self.sample(c.sequence_id) for c in chunks if c.sample)

    def decode(self, step: DecodeScheduled) -> tuple[int, ...]:
        rows = self.batches[step.slot]
        assert list(step.left) == sorted(set(step.left))
        for row in reversed(step.left):
            del rows[row]
        rows.extend(step.joined)
        if step.verified:
            assert not rows
            assert not step.joined
            return tuple(token for each in step.verified for token in self.verify(each))
        assert len(rows) == step.num_rows == len(set(rows)) > 0
        for row, page in zip(step.page_rows, step.new_pages, strict=True):
            self.tables[rows[row]].append(page)
        for sequence_id in rows:
            self.compute(sequence_id)
        of_chunks = self.prefill(step.chunks)
        # The last of the writes may not have spoilt what another row reads.
        return tuple(self.sample(sequence_id) for sequence_id in rows) + of_chunks

    def verify(self, verified: VerifiedSequence) -> list[int]:
        """The token behind each row; of those that follow from right drafts the history is made."""
        sequence_id, table = verified.sequence_id, self.tables[verified.sequence_id]
        history, size = self.histories[sequence_id], self.case.page_size
        known, draft = len(history), verified.token_ids[1:]
        assert not self.sampling[sequence_id].needs, "only the likeliest tokens can be verified"
        assert verified.token_ids[0] == history[-1]
        assert known == verified.num_computed + 1 <= self.computed[sequence_id] + 1
        self.computed[sequence_id] = verified.num_computed
        del table[-(-verified.num_computed // size) :]
        table.extend(verified.new_pages)
        assert len(table) == -(-(known + len(draft)) // size), "exactly the pages needed"
        history.extend(draft)
        for _ in verified.token_ids:
            self.compute(sequence_id)
        cached = [self.memory[table[p // size] * size + p % size] for p in range(len(history))]
        begun = self.rotary_len(sequence_id)
        places = range(len(history))
        assert cached == [self.cell(sequence_id, place, begun) for place in places], "overwritten"
        seed = self.sampling[sequence_id].seed
        sampled = [next_token(history[: known + row], seed) for row in range(len(draft) + 1)]
        history[known:] = sampled[: agreed(draft, sampled) + 1]
        return sampled

    def cells(self, page: int) -> slice:
        return slice(page * self.case.page_size, (page + 1) * self.case.page_size)

    def rotary_len(self, sequence_id: int) -> int:
        request = self.case.requests[sequence_id]  # they are added in order
        return self.case.rotary_len(request, len(self.histories[sequence_id]))

    def cell(self, sequence_id: int, position: int, rotary_len: int) -> tuple[int, int, int]:
        """What a token's keys and values follow from; the sequence, where it may share none."""
        token = self.histories[sequence_id][position]
        if rotary_len > self.max_sharing_tokens or position >= rotary_len:
            return sequence_id, token, rotary_len
        tokens_before = bytes(self.histories[sequence_id][:position])
        return -1 - zlib.crc32(tokens_before), token, 0

    def compute(self, sequence_id: int) -> None:
        table, position = self.tables[sequence_id], self.computed[sequence_id]
        size = self.case.page_size
        cell = self.cell(sequence_id, position, self.rotary_lens[sequence_id])
        self.memory[table[position // size] * size + position % size] = cell
        self.computed[sequence_id] = position + 1

    def sample(self, sequence_id: int) -> int:
        history, table = self.histories[sequence_id], self.tables[sequence_id]
        size = self.case.page_size
        assert self.computed[sequence_id] == len(history), "all known tokens are computed"
        assert len(table) == -(-len(history) // size), "exactly the pages needed"
        cached = [self.memory[table[p // size] * size + p % size] for p in range(len(history))]
        begun = self.rotary_len(sequence_id)
        wanted = [self.cell(sequence_id, position, begun) for position in range(len(history))]
        assert cached == wanted, "a page was overwritten, or should have been"
        token = next_token(history, self.sampling[sequence_id].seed)
        history.append(token)
        return token


@dataclass
class Outcome:
    tokens: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, FinishReason] = field(default_factory=dict)
    closed: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    statistics: SchedulerStatistics | None = None


@dataclass
class AheadSimulation:
    """Feeds the core as the runner does; checks what must hold at every moment."""

    ahead: AheadCase
    outcome: Outcome = field(default_factory=Outcome)
    requests: dict[int, Request] = field(default_factory=dict)
    opened: set[int] = field(default_factory=set)
    messages: deque[RequestOpened | RequestClosed | Move | Step] = field(default_factory=deque)
    flight: deque[tuple[Step, tuple[int, ...]]] = field(default_factory=deque)  # who samples
    batches: dict[int, list[int]] = field(default_factory=dict)
    sampled_in: dict[int, int] = field(default_factory=dict)  # by sequence, its latest step

    def run(self) -> Outcome:
        case, random = self.ahead.case, Random(self.ahead.case.seed)
        core = self.core = self.ahead.core()
        num_cells = case.num_pages * case.page_size
        self.stage = Stage(case, self.ahead.max_sharing_tokens, [None] * num_cells)
        self.stage.batches = [[] for _ in range(case.num_slots)]
        arrivals = deque(case.requests)
        to_cancel = list(case.cancel)
        for _ in range(20_000):
            if not arrivals and core.is_idle:
                break
            choice = random.random()
            if arrivals and (choice < 0.3 or not self.flight):
                request = arrivals.popleft()
                self.requests[core.add(request)] = request
                self.outcome.tokens[request.request_id] = []
            elif to_cancel and choice > 0.9:
                self.obey(core.stop(to_cancel.pop(), FinishReason.ERROR))
            elif self.flight and choice < 0.8:
                self.bring_back()
            if random.random() < 0.8 or not self.flight:
                while self.dispatch():
                    pass
            self.check(len(arrivals))
        assert core.is_idle, "no progress"
        while self.messages:
            self.stage.follow(self.messages.popleft())
        assert not self.stage.histories, "every sequence is closed"
        assert Counter(self.outcome.closed) == Counter(range(len(case.requests)))
        self.outcome.statistics = core.statistics()
        assert self.outcome.statistics.num_free_pages == case.num_pages
        return self.outcome

    def bring_back(self) -> None:
        step, _ = self.flight.popleft()
        while (message := self.messages.popleft()) is not step:
            self.stage.follow(message)
        self.obey(self.core.sampled(step.step, self.stage.follow(step)))
        while accepted := self.core.accepted():
            self.obey(accepted)

    def dispatch(self) -> bool:
        case, rounds, num_in_flight = self.ahead.case, self.ahead.lookahead, len(self.flight)
        known = self.core._slot_allocator.pages._known.copy()
        step = self.core.next_step()
        self.messages.extend(self.core.take_page_moves())
        if step is None:
            return False
        self.check_writes(step, known)
        assert step.step == len(self.outcome.steps)
        assert num_in_flight < case.num_slots * (1 + rounds)
        assert step.num_tokens <= case.max_tokens_per_step or not step_chunks(step)
        rows: tuple[int, ...] = ()
        if isinstance(step, DecodeScheduled):
            rows = self.rows_of_decode(step)
            if num_in_flight >= case.num_slots and not step.verified:
                ready = [self.sampled_in[sequence_id] + case.num_slots for sequence_id in rows]
                assert max(ready) <= step.step, "the first stage would wait for these tokens"
        rows += self.rows_of_chunks(step_chunks(step))
        num_rows = {each.sequence_id: len(each.token_ids) for each in verified_in(step)}
        assert len(rows) == len(set(rows)) > 0 or not step.num_sampled
        assert step.num_sampled == sum(num_rows.get(row, 1) for row in rows)
        self.sampled_in.update(dict.fromkeys(rows, step.step))
        self.flight.append((step, rows))
        pending = Counter(row for _, rows_of_step in self.flight for row in rows_of_step)
        assert not pending or max(pending.values()) <= 1 + rounds
        for sequence_id in rows:
            num_pending = pending[sequence_id]
            if sequence_id in num_rows:
                assert num_pending == 1, "drafts follow known tokens"
            self.check_length(sequence_id, num_rows.get(sequence_id, num_pending))
        if step.steady:
            assert not any(step_chunks(other) for other, _ in self.flight)
        self.messages.append(step)
        self.outcome.steps.append(step)
        return True

    def check_writes(self, step: Step, known: dict[int, KnownPage]) -> None:
        """No step writes to a page that others may have found before."""
        allocator, size = self.core._slot_allocator, self.ahead.case.page_size
        running = {sequence.sequence_id: sequence for sequence in allocator.running}
        written: list[int] = []
        for chunk in step_chunks(step):
            end = chunk.num_computed + chunk.num_tokens
            if (sequence := running.get(chunk.sequence_id)) is not None:
                written += sequence.pages[chunk.num_computed // size : -(-end // size)]
        if isinstance(step, DecodeScheduled):
            batch = allocator.slots[step.slot].batch
            for sequence in batch.rows.sequences:
                if sequence.in_batch:
                    page = sequence.pages[(sequence.base + batch.round - 1) // size]
                    assert allocator.pages.num_owners(page) == 1
                    written.append(page)
        now = allocator.pages._known
        assert not [p for p in written if p in known and now.get(p) is known[p]]

    def rows_of_chunks(self, chunks: tuple[ScheduledSequence, ...]) -> tuple[int, ...]:
        sizes = [chunk.num_tokens > 1 for chunk in chunks]
        assert sizes == sorted(sizes), "shares of one token first"
        for chunk in chunks:
            assert chunk.num_tokens > 0
            if self.core.begins(chunk.sequence_id, len(self.outcome.steps)):
                self.open(chunk.sequence_id)
            else:
                assert chunk.num_computed > 0
        return tuple(chunk.sequence_id for chunk in chunks if chunk.sample)

    def rows_of_decode(self, step: DecodeScheduled) -> tuple[int, ...]:
        rows = self.batches.setdefault(step.slot, [])
        for row in reversed(step.left):
            del rows[row]
        rows.extend(step.joined)
        if step.verified:
            assert not rows
            rows = [each.sequence_id for each in step.verified]
        assert len(rows) <= self.ahead.case.max_sequences_per_slot
        finished = [row for row in rows if self.requests[row].request_id in self.outcome.reasons]
        assert not finished, "a sequence that is known to have ended leaves at the next step"
        return tuple(rows)

    def open(self, sequence_id: int) -> None:
        request = self.requests[sequence_id]
        token_ids = request.prompt_ids
        if sequence_id in self.opened:
            pending = [step for step, rows in self.flight if sequence_id in rows]
            assert not pending, "starts over before its tokens are known"
            token_ids = self.core.known_tokens(sequence_id)
        self.opened.add(sequence_id)
        rotary_len = self.core.rotary_len(sequence_id)
        self.messages.append(RequestOpened(sequence_id, token_ids, request.sampling, rotary_len))

    def check_length(self, sequence_id: int, num_pending: int) -> None:
        request, case = self.requests[sequence_id], self.ahead.case
        num_tokens = len(self.outcome.tokens[request.request_id]) + num_pending
        assert num_tokens <= request.sampling.max_new_tokens, "a surplus step for a known limit"
        limit = min(case.max_context_tokens, case.num_pages * case.page_size)
        assert num_tokens + len(request.prompt_ids) <= limit

    def check(self, num_to_arrive: int) -> None:
        statistics = self.core.statistics()
        assert statistics.num_steps_in_flight == len(self.flight)
        counts = (statistics.num_waiting, statistics.num_running, statistics.num_finished)
        assert sum(counts) == len(self.ahead.case.requests) - num_to_arrive
        if not statistics.num_running:
            assert statistics.num_free_pages == self.ahead.case.num_pages
        pages = self.core._slot_allocator.pages
        owned = Counter(page for s in self.core._slot_allocator.running for page in s.pages)
        assert len(owned) == statistics.num_pages - statistics.num_free_pages
        assert all(pages.num_owners(page) == owned[page] for page in range(pages.num_pages))
        assert all(page in pages._known for page, number in owned.items() if number > 1)
        saved = [page for s in self.core._slot_allocator.waiting for page in s.host_pages]
        assert len(saved) == len(set(saved)) <= self.ahead.num_host_pages
        num_free = self.core._slot_allocator.host_pages.num_free
        assert num_free == self.ahead.num_host_pages - len(saved)
        assert self.core._slot_allocator._num_promised == sum(
            s.num_promised for s in self.core._slot_allocator.running
        )

    def obey(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case TokensEmitted():
                    assert set(instruction.finish_reasons) <= set(range(len(instruction.token_ids)))
                    pairs = zip(instruction.sequence_ids, instruction.token_ids, strict=True)
                    for row, (sequence_id, token_id) in enumerate(pairs):
                        self.take(sequence_id, token_id, row in instruction.finish_reasons)
                case Finished():
                    request_id = self.requests[instruction.sequence_id].request_id
                    assert request_id not in self.outcome.reasons, "finished twice"
                    self.outcome.reasons[request_id] = instruction.reason
                    assert list(instruction.token_ids) == self.outcome.tokens[request_id]
                case Closed():
                    self.outcome.closed.extend(instruction.sequence_ids)
                    self.messages.append(RequestClosed(instruction.sequence_ids))
                    flying = {row for _, rows in self.flight for row in rows}
                    assert not flying & set(instruction.sequence_ids), "closed while in flight"

    def take(self, sequence_id: int, token_id: int, ends: bool) -> None:
        """As the runner: a stop string is noticed when its last token is."""
        request = self.requests[sequence_id]
        assert request.request_id not in self.outcome.reasons, "a surplus token was not dropped"
        self.outcome.tokens[request.request_id].append(token_id)
        if self.ahead.stop_at.get(request.index) == token_id and not ends:
            self.obey(self.core.stop(sequence_id, STOP))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ahead_cases())
def test_every_request_gets_the_tokens_it_would_get_alone(ahead: AheadCase) -> None:
    outcome = AheadSimulation(ahead).run()
    assert outcome.statistics is not None
    event(f"preempted: {outcome.statistics.num_preemptions > 0}")
    event(f"saved: {outcome.statistics.num_saved > 0}")
    event(f"accepted: {outcome.statistics.drafts.num_accepted > 0}")
    assert list(outcome.tokens) == [request.request_id for request in ahead.case.requests]
    for request in ahead.case.requests:
        tokens, reason = ahead.expected(request)
        assert outcome.tokens[request.request_id] == tokens
        assert outcome.reasons[request.request_id] is reason


@settings(max_examples=125, deadline=None, derandomize=True)
@given(sharing_cases())
def test_sequences_that_share_pages_get_the_tokens_they_would_get_alone(ahead: AheadCase) -> None:
    outcome = AheadSimulation(ahead).run()
    found = outcome.statistics
    assert found is not None
    event(f"shared: {found.num_shared_tokens > 0}, preempted: {found.num_preemptions > 0}")
    event(f"shared: {found.num_shared_tokens > 0}, saved: {found.num_saved > 0}")
    for request in ahead.case.requests:
        tokens, reason = ahead.expected(request)
        assert outcome.tokens[request.request_id] == tokens
        assert outcome.reasons[request.request_id] is reason
    chunks = [chunk for step in outcome.steps for chunk in step_chunks(step)]
    num_known = sum(len(request.prompt_ids) for request in ahead.case.requests)
    num_computed = sum(chunk.num_tokens for chunk in chunks)
    assert found.num_shared_tokens < num_known
    if not found.num_preemptions and not ahead.case.restart_tokens and not ahead.stop_at:
        assert num_computed + found.num_shared_tokens == num_known


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ahead_cases())
def test_completions_are_those_of_the_core_that_awaits_every_token(ahead: AheadCase) -> None:
    outcome = AheadSimulation(replace(ahead, stop_at={})).run()
    other = Simulation(ahead.case).run()
    assert outcome.tokens == other.tokens
    assert outcome.reasons == other.reasons


@settings(max_examples=150, deadline=None, derandomize=True)
@given(ahead_cases())
def test_without_lookahead_no_token_is_surplus(ahead: AheadCase) -> None:
    outcome = AheadSimulation(replace(ahead, lookahead=0, drafts=0)).run()
    num_sampled = sum(step.num_sampled for step in outcome.steps)
    assert num_sampled == sum(len(tokens) for tokens in outcome.tokens.values())


def run_at_once(core: SchedulerCore | AwaitingCore, case: Case) -> list[tuple[int, int]]:
    """All requests there from the start, every token 1: slot and number of tokens of each step."""
    for request in case.requests:
        core.add(request)
    flight: deque[Step] = deque()
    found = []
    while not core.is_idle:
        while (step := core.next_step()) is not None:
            flight.append(step)
            found.append((step.slot, step.num_tokens))
        step = flight.popleft()
        core.sampled(step.step, (1,) * step.num_sampled)
    return found


def workload(seed: int, num_slots: int, num_pages: int) -> Case:
    """Many more requests than places, of any length."""
    random = Random(seed)
    requests = tuple(
        Request(
            f"r{index}",
            index,
            tuple(range(random.randint(1, 60))),
            SamplingParams(max_new_tokens=random.randint(1, 50)),
        )
        for index in range(60)
    )
    return Case(
        num_slots=num_slots,
        max_sequences_per_slot=random.choice((4, 8)),
        max_tokens_per_step=random.choice((8, 32, 100)),
        num_pages=num_pages,
        page_size=4,
        max_context_tokens=200,
        requests=requests,
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(5))
def test_one_slot_makes_the_steps_of_the_core_that_awaits_every_token(seed: int) -> None:
    case = workload(seed, num_slots=1, num_pages=10_000)
    core = AheadCase(case, lookahead=0, mixed=True).core()
    assert run_at_once(core, case) == run_at_once(case.core(), case)


@pytest.mark.parametrize("num_slots", [2, 4])
@pytest.mark.parametrize("num_pages", [60, 100, 10_000])
def test_as_many_steps_are_enough_as_when_every_token_is_awaited(
    num_slots: int, num_pages: int
) -> None:
    """Over ten workloads: which sequences share a slot changes, and with it how the last end."""
    num_steps = num_awaiting = 0
    for seed in range(10):
        case = workload(seed, num_slots, num_pages)
        core = AheadCase(case, lookahead=0, mixed=True).core()
        num_steps += len(run_at_once(core, case))
        num_awaiting += len(run_at_once(case.core(), case))
    assert num_steps <= num_awaiting


@settings(max_examples=50, deadline=None, derandomize=True)
@given(ahead_cases())
def test_equal_events_give_equal_steps(ahead: AheadCase) -> None:
    assert AheadSimulation(ahead).run().steps == AheadSimulation(ahead).run().steps


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ahead_cases(), st.data())
def test_cancelled_requests_end_once_and_the_others_are_not_touched(
    ahead: AheadCase, data: st.DataObject
) -> None:
    indices = st.lists(st.integers(0, len(ahead.case.requests) - 1), max_size=5)
    ahead = replace(ahead, case=replace(ahead.case, cancel=tuple(data.draw(indices))))
    outcome = AheadSimulation(ahead).run()
    assert len(outcome.reasons) == len(ahead.case.requests)
    for request in ahead.case.requests:
        tokens, reason = ahead.expected(request)
        got = outcome.tokens[request.request_id]
        if outcome.reasons[request.request_id] is FinishReason.ERROR:
            assert request.index in ahead.case.cancel
            assert got == tokens[: len(got)]
        else:
            assert (got, outcome.reasons[request.request_id]) == (tokens, reason)


@pytest.mark.parametrize("num_host_pages", [0, 8, 200])
@pytest.mark.parametrize("restart_tokens", [0, 7, 15])
@pytest.mark.parametrize("mixed", [False, True], ids=PREFILL)
@pytest.mark.parametrize("lookahead", [0, 1])
def test_the_cases_reach_heavy_preemption(
    mixed: bool, restart_tokens: int, lookahead: int, num_host_pages: int
) -> None:
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
    ahead = AheadCase(case, lookahead=lookahead, mixed=mixed, num_host_pages=num_host_pages)
    outcome = AheadSimulation(ahead).run()
    found = outcome.statistics
    assert found is not None
    assert found.num_preemptions > 10
    assert (found.num_saved > 0) == (num_host_pages > 0)
    assert (found.num_saved < found.num_preemptions) == (num_host_pages < 200)
    if num_host_pages == 200 and not restart_tokens:
        assert not found.num_recomputed_tokens
    filled_up = any(isinstance(step, DecodeScheduled) and step.chunks for step in outcome.steps)
    assert filled_up == mixed
    assert [outcome.tokens[r.request_id] for r in requests] == [alone(case, r)[0] for r in requests]


def small_pool(seed: int) -> Case:
    """Few pages for long completions."""
    random = Random(seed)
    requests = tuple(
        Request(
            f"r{index}",
            index,
            tuple(range(1, 1 + random.randint(1, 8))),
            SamplingParams(max_new_tokens=random.randint(6, 20), ignore_eos=random.random() < 0.8),
        )
        for index in range(random.randint(5, 14))
    )
    return Case(
        num_slots=random.choice([1, 2, 3]),
        max_sequences_per_slot=random.choice([2, 3, 5]),
        max_tokens_per_step=random.choice([6, 8, 24]),
        num_pages=random.randint(14, 20),
        page_size=random.choice([2, 3]),
        max_context_tokens=60,
        requests=requests,
        seed=seed,
        restart_tokens=random.choice([0, 0, 10]),
    )


@pytest.mark.parametrize("mixed", [False, True], ids=PREFILL)
@pytest.mark.parametrize("lookahead", [0, 1, 2, 3])
def test_saved_sequences_get_the_tokens_that_they_would_get_alone(
    lookahead: int, mixed: bool
) -> None:
    num_saved = 0
    for seed in range(12):
        random, case = Random(seed), small_pool(seed)
        ahead = AheadCase(
            case,
            lookahead=lookahead,
            mixed=mixed,
            stop_at={index: random.randint(1, 23) for index in range(3)},
            num_host_pages=random.choice([3, 10, 100]),
            min_saved_tokens=random.choice([1, 4]),
        )
        outcome = AheadSimulation(ahead).run()
        assert outcome.statistics is not None
        num_saved += outcome.statistics.num_saved
        for request in case.requests:
            tokens, reason = ahead.expected(request)
            assert outcome.tokens[request.request_id] == tokens
            assert outcome.reasons[request.request_id] is reason
    assert num_saved > 10


@pytest.mark.parametrize("seed", [142, 255, 558, 562])
def test_a_prompt_that_starts_over_may_take_the_pages_of_younger_rows_of_its_step(
    seed: int,
) -> None:
    random = Random(seed)
    requests = tuple(
        Request(
            f"r{index}",
            index,
            tuple(range(1, 1 + random.randint(1, 8))),
            SamplingParams(max_new_tokens=random.randint(6, 20), ignore_eos=True),
        )
        for index in range(random.randint(3, 8))
    )
    case = Case(
        num_slots=random.choice([1, 2]),
        max_sequences_per_slot=random.choice([3, 4, 6]),
        max_tokens_per_step=random.choice([6, 7, 8]),
        num_pages=random.randint(14, 20),
        page_size=random.choice([1, 2]),
        max_context_tokens=60,
        requests=requests,
        seed=seed,
        restart_tokens=random.choice([9, 10, 12, 14]),
    )
    outcome = AheadSimulation(AheadCase(case, lookahead=0, mixed=True)).run()
    assert [outcome.tokens[r.request_id] for r in requests] == [alone(case, r)[0] for r in requests]
