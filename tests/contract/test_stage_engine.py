"""The launch-ahead engine: its tables against simple models, its tokens against the plain path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
import torch

from mpipipe.clock import ScriptedClock
from mpipipe.control_plane.messages import (
    DecodeScheduled,
    RequestOpened,
    ScheduledSequence,
    StepScheduled,
)
from mpipipe.planning.step_limits import row_buckets
from mpipipe.planning.workload import SamplingUse
from mpipipe.progress import ProgressEngine
from mpipipe.sampling_options import SamplingNeeds
from mpipipe.stage import decode_batch
from mpipipe.stage.assembly import open_engine
from mpipipe.stage.cpu_stream import CpuStream
from mpipipe.stage.cuda_graph_runner import GraphKey
from mpipipe.stage.decode_batch import DecodeBatch
from mpipipe.stage.device_sampler import column_entries
from mpipipe.stage.request_table import RequestTable
from mpipipe.types import FinishReason, Request, SamplingParams
from tests.contract.engine_pipeline import (
    EOS,
    EnginePipeline,
    ForetellingDrafter,
    TensorSdpa,
    build_stage,
    cache_of,
    engine_plan,
    make_requests,
    plain_outcomes,
)
from tests.contract.replaying_stream import PooledStream, ReplayingStream
from tests.contract.tiny_models import TinyModel

MODES = ["varlen", "tensors", "replayed"]
LENGTHS = (5, 11, 3, 18, 7, 1, 26, 4)
VOCAB = 50


# ---- request rows
# ---------------------------------------------------------------------------------------


def opened(
    sequence_id: int, prompt: tuple[int, ...] = (1, 2, 3), **options: float
) -> RequestOpened:
    return RequestOpened(sequence_id, prompt, SamplingParams(**options))  # type: ignore[arg-type]


def chunk(
    step: int, *entries: tuple[int, int, int, tuple[int, ...], bool], slot: int = 0
) -> StepScheduled:
    return StepScheduled(step, slot, tuple(ScheduledSequence(*entry) for entry in entries), False)


def test_a_sequence_keeps_its_request_row_until_it_is_closed_and_then_another_gets_it() -> None:
    request_table = RequestTable(2, 4, VOCAB, 16)
    first, second = request_table.open(opened(7)), request_table.open(opened(8))
    assert {first, second} == {0, 1}
    assert request_table.open(opened(7, (1, 2, 3, 4))) == first  # begins again
    assert request_table.tokens[first] == (1, 2, 3, 4)
    with pytest.raises(AssertionError, match="more than 2"):
        request_table.open(opened(9))
    request_table.close((7, 99))  # one that was never opened here has no row
    assert len(request_table) == 1
    assert request_table.open(opened(9)) == first
    assert sorted(request_table.close(request_table.open_ids())) == [0, 1]
    assert len(request_table) == 0


def test_chunks_of_a_prompt_are_placed_one_after_the_other() -> None:
    request_table = RequestTable(4, 3, VOCAB, 16)
    request_table.open(opened(5, tuple(range(10, 19))))
    request_table.open(opened(6, (40, 41)))
    step = chunk(0, (6, 0, 2, (3,), True), (5, 0, 5, (8, 2), False))
    ((first, first_pages), (second, second_pages)) = request_table.place(step.sequences, 0)
    assert (first.query_start, first.query_len, first.kv_len, first_pages) == (0, 2, 2, [3])
    assert (second.query_start, second.query_len, second.kv_len) == (2, 5, 5)
    assert second_pages == [8, 2]
    assert request_table.input_ids(step.sequences).tolist() == [40, 41, 10, 11, 12, 13, 14]
    assert request_table.sampled_request_rows(step.sequences).tolist() == [request_table.row(6)]
    following = chunk(1, (5, 5, 4, (1,), True))
    ((seq_len, pages),) = request_table.place(following.sequences, 1)
    assert (seq_len.kv_len, seq_len.num_computed, pages) == (9, 5, [8, 2, 1])
    assert request_table.input_ids(following.sequences).tolist() == [15, 16, 17, 18]
    assert (
        request_table.sampled_in[request_table.row(6)],
        request_table.sampled_in[request_table.row(5)],
    ) == (0, 1)


def test_a_sequence_that_begins_again_forgets_its_pages() -> None:
    request_table = RequestTable(1, 3, VOCAB, 16)
    request_table.open(opened(0, (1, 2, 3, 4)))
    request_table.place(chunk(0, (0, 0, 4, (5, 6), True)).sequences, 0)
    request_table.open(opened(0, (1, 2, 3, 4, 5)))
    ((_, pages),) = request_table.place(chunk(1, (0, 0, 5, (9,), True)).sequences, 1)
    assert pages == [9]
    with pytest.raises(AssertionError, match="4 pages"):
        request_table.add_pages(0, (1, 2, 3))


# ---- the decode batch against a naive model ------------------------------------------------------


@dataclass
class Naive:
    """One sequence as the messages tell of it."""

    sequence_id: int
    sampling: SamplingParams
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    sampled_in: int = -1


class Scripted:
    """Random messages for two slots; what every stage should hold after each."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.request_table = RequestTable(12, 30, VOCAB, 16)
        stream = CpuStream(torch.device("cpu"), ScriptedClock(), ProgressEngine())
        self.batches = [
            DecodeBatch(self.request_table, stream, max_rows=5, unused=(12, 777)) for _ in range(2)
        ]
        self.rows: list[list[Naive]] = [[], []]
        self.leaving: list[set[int]] = [set(), set()]  # sequence ids
        self.ready: list[list[Naive]] = [[], []]  # prefilled, not in a batch
        self.step = 0
        self.next_id = 0
        self.next_page = 0

    def page(self) -> int:
        self.next_page += 1
        return self.next_page

    def sampling(self) -> SamplingParams:
        rng = self.rng
        return SamplingParams(
            temperature=rng.choice([0.0, 0.7]),
            top_k=rng.choice([0, 5]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.5]),
            presence_penalty=rng.choice([0.0, 0.0, -0.5]),
            seed=rng.randrange(100),
            num_logprobs=rng.choice([-1, -1, 0, 3]),
        )

    def open_and_compute(self, slot: int, sequence: Naive | None = None) -> None:
        """A new sequence, or one that lost its pages, gets its prompt computed."""
        if sequence is None:
            if len(self.request_table) == self.request_table.num_request_rows:
                return
            sequence = Naive(self.next_id, self.sampling())
            self.next_id += 1
        length = self.rng.randrange(1, 9)
        sequence = Naive(sequence.sequence_id, sequence.sampling)
        self.request_table.open(
            RequestOpened(sequence.sequence_id, tuple(range(length)), sequence.sampling)
        )
        sequence.pages = [self.page() for _ in range(-(-length // 4))]
        sequence.num_computed, sequence.sampled_in = length, self.step
        entry = (sequence.sequence_id, 0, length, tuple(sequence.pages), True)
        self.request_table.place(chunk(self.step, entry, slot=slot).sequences, self.step)
        self.step += 1
        self.ready[slot].append(sequence)

    def leave(self, slot: int) -> None:
        """A row's sequence finishes, or is preempted and at once computed again elsewhere."""
        live = [s for s in self.rows[slot] if s.sequence_id not in self.leaving[slot]]
        if not live:
            return
        sequence = self.rng.choice(live)
        self.leaving[slot].add(sequence.sequence_id)
        if self.rng.random() < 0.5:
            self.request_table.close((sequence.sequence_id,))
        else:
            self.open_and_compute(self.rng.randrange(2), sequence)

    def decode(self, slot: int) -> DecodeScheduled | None:
        rows = self.rows[slot]
        left = [n for n, s in enumerate(rows) if s.sequence_id in self.leaving[slot]]
        kept = [s for n, s in enumerate(rows) if n not in left]
        room = 5 - len(kept)
        num_joining = self.rng.randint(0, min(room, len(self.ready[slot])))
        joined = self.ready[slot][:num_joining]
        if not kept and not joined:
            return None
        del self.ready[slot][:num_joining]
        self.leaving[slot].clear()
        rows = self.rows[slot] = kept + joined
        pages = {n: self.page() for n, s in enumerate(rows) if s.num_computed % 4 == 0}
        for row, page in pages.items():
            rows[row].pages.append(page)
        latest = max(s.sampled_in for s in (*kept, *joined))
        ids = tuple(s.sequence_id for s in joined)
        assert self.batches[slot].latest_sample(ids) >= latest
        message = DecodeScheduled(
            self.step, slot, len(rows), tuple(left), ids, tuple(pages), tuple(pages.values()), False
        )
        self.step += 1
        return message


def check_rows(scripted: Scripted, slot: int) -> None:
    """After `apply`, before the device has advanced: its side is the naive model's."""
    batch, rows = scripted.batches[slot], scripted.rows[slot]
    device, num_rows = batch.device, len(rows)
    request_rows = [scripted.request_table.row(s.sequence_id) for s in rows]
    assert len(batch) == num_rows
    assert device["request_rows"][:num_rows].tolist() == request_rows == batch.request_rows.tolist()
    assert device["kv_len"][:num_rows].tolist() == [s.num_computed for s in rows]
    assert batch.lengths.tolist() == [s.num_computed + 1 for s in rows]
    for row, sequence in enumerate(rows):
        found = device["pages"][row, : len(sequence.pages)].tolist()
        assert found == sequence.pages
        for name, value in column_entries(sequence.sampling, VOCAB).items():
            assert device[name][row].item() == pytest.approx(value), name
    assert device["active"].tolist() == [1] * num_rows + [0] * (8 - num_rows)
    assert set(device["request_rows"][num_rows:].tolist()) <= {12}
    assert set(device["pages"][num_rows:, 0].tolist()) <= {777}  # the one that such a row writes to
    assert set(device["kv_len"][num_rows:].tolist()) <= {0}
    needs = SamplingNeeds.NOTHING
    for sequence in rows:
        needs |= sequence.sampling.needs
    assert batch.needs == needs
    assert batch.max_logprobs == max([s.sampling.num_logprobs for s in rows], default=-1)


@pytest.mark.parametrize("whole_table", [True, False], ids=["whole", "used-columns"])
@pytest.mark.parametrize("seed", range(10))
def test_the_rows_are_those_that_the_messages_tell_of(
    seed: int, whole_table: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole_table:
        monkeypatch.setattr(decode_batch, "_WHOLE_TABLE_BYTES", 0)
    scripted = Scripted(seed)
    num_decodes = 0
    for _ in range(200):
        slot = scripted.rng.randrange(2)
        action = scripted.rng.choice(["open", "leave", "decode", "decode", "decode"])
        if action == "open":
            scripted.open_and_compute(slot)
        elif action == "leave":
            scripted.leave(slot)
        elif (message := scripted.decode(slot)) is not None:
            num_decodes += 1
            batch = scripted.batches[slot]
            batch.apply(message)
            check_rows(scripted, slot)
            batch.device["kv_len"].add_(batch.device["active"])  # what the step's program does
            for sequence in scripted.rows[slot]:
                sequence.num_computed += 1
                sequence.sampled_in = message.step
    assert num_decodes > 50


def test_a_step_without_changes_copies_nothing() -> None:
    scripted = Scripted(0)
    scripted.open_and_compute(0)
    batch = scripted.batches[0]
    batch.apply(DecodeScheduled(1, 0, 1, (), (0,), (), (), False))
    before = {name: tensor.clone() for name, tensor in batch.device.items()}
    batch.device["kv_len"].fill_(1234)  # an upload would put it right
    batch.apply(DecodeScheduled(2, 0, 1, (), (), (), (), False))
    assert batch.device["kv_len"].tolist() == [1234] * 8
    assert all(
        torch.equal(batch.device[name], kept) for name, kept in before.items() if name != "kv_len"
    )


def test_the_head_and_a_stage_that_disagree_on_the_rows_are_our_bug() -> None:
    scripted = Scripted(0)
    scripted.open_and_compute(0)
    with pytest.raises(AssertionError, match="1 rows, the head has 2"):
        scripted.batches[0].apply(DecodeScheduled(1, 0, 2, (), (0,), (), (), False))


# ---- programs ------------------------------------------------------------------------------------


def test_buckets_grow_so_that_little_is_padding() -> None:
    assert row_buckets(1) == (1,)
    assert row_buckets(5) == (1, 2, 4, 5)
    assert row_buckets(8) == (1, 2, 4, 8)
    assert len(row_buckets(256)) == 19
    for most in (1, 2, 3, 7, 8, 9, 31, 64, 100, 256, 300):
        sizes = row_buckets(most)
        assert sizes[-1] == most
        assert list(sizes) == sorted(set(sizes))
        for rows in range(8, most + 1):
            bucket = next(size for size in sizes if size >= rows)
            assert bucket - rows <= max(7, bucket // 4)


GREEDY = SamplingParams(max_new_tokens=9, ignore_eos=True)


def greedy_requests(num_tokens: int = 9) -> list[Request]:
    return make_requests(
        LENGTHS, lambda n: GREEDY.replace(max_new_tokens=num_tokens + n % 3, num_logprobs=-1)
    )


def tokens_of(pipeline: EnginePipeline, requests: list[Request], seed: int = 0) -> list[list[int]]:
    return [list(outcome.token_ids) for outcome in pipeline.generate(requests, seed=seed)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_greedy_tokens_are_those_of_transformers(
    num_stages: int, mode: str, tiny: Callable[[str], TinyModel]
) -> None:
    model, requests = tiny("llama"), greedy_requests()
    wanted = [model.greedy(r.prompt_ids, r.sampling.max_new_tokens) for r in requests]
    plan = engine_plan(num_stages, graphs=mode == "replayed")
    pipeline = EnginePipeline(model, plan, mode).prepare()
    for seed in range(3):  # the same engines, one generate call after the other
        assert tokens_of(pipeline, requests, seed) == wanted
    for engine in pipeline.engines:
        num_buckets, num_slots = len(row_buckets(3)), num_stages
        assert engine.graph_runner.num_graphs == (mode == "replayed") * num_buckets * num_slots


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["opt", "qwen3", "gemma2", "llama-tied"])
def test_other_families_run_too(family: str, mode: str, tiny: Callable[[str], TinyModel]) -> None:
    model, requests = tiny(family), greedy_requests()[:5]
    wanted = [model.greedy(r.prompt_ids, r.sampling.max_new_tokens) for r in requests]
    pipeline = EnginePipeline(model, engine_plan(2, graphs=mode == "replayed"), mode).prepare()
    assert tokens_of(pipeline, requests) == wanted


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape",
    [
        {"num_slots": 1, "max_sequences": 8},
        {"num_slots": 4, "max_sequences": 1},
        {"prefill": "mixed"},
        {"max_tokens_per_step": 3},
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_how_steps_are_formed(
    shape: dict[str, int], mode: str, tiny: Callable[[str], TinyModel]
) -> None:
    model, requests = tiny("llama"), greedy_requests()
    wanted = [model.greedy(r.prompt_ids, r.sampling.max_new_tokens) for r in requests]
    plan = engine_plan(2, graphs=mode == "replayed", **shape)  # type: ignore[arg-type]
    pipeline = EnginePipeline(model, plan, mode).prepare()
    assert tokens_of(pipeline, requests) == wanted


# ---- drafts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("num_stages", "shape"),
    [(1, {"num_pages": 16}), (2, {}), (2, {"lookahead": 2}), (3, {"num_pages": 16})],
    ids=str,
)
def test_drafts_change_no_token(
    shape: dict[str, int], num_stages: int, mode: str, tiny: Callable[[str], TinyModel]
) -> None:
    """Right, wrong, and right up to a point; beside sequences that may have none."""
    model = tiny("llama")
    requests = greedy_requests(20)
    requests[3] = dataclasses.replace(requests[3], sampling=sampled(2))
    requests[6] = dataclasses.replace(requests[6], sampling=sampled(1))
    plan = engine_plan(num_stages, graphs=mode == "replayed", drafted_rows=8, **shape)  # type: ignore[arg-type]
    pipeline = EnginePipeline(model, plan, mode)
    pipeline.prepare(SamplingUse.of(request.sampling for request in requests))
    wanted = pipeline.generate(requests)
    assert not pipeline.drafts.num_drafted
    token_ids = [outcome.token_ids for outcome in wanted]
    for seed in range(2):
        drafter = ForetellingDrafter(token_ids, seed)
        found = pipeline.generate(requests, seed=seed, drafter=drafter)
        assert [outcome.token_ids for outcome in found] == token_ids
        assert [outcome.reason for outcome in found] == [outcome.reason for outcome in wanted]
        assert 0 < pipeline.drafts.num_accepted < pipeline.drafts.num_drafted
    assert (pipeline.num_preemptions > 0) == ("num_pages" in shape)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_tokens_of_the_step_that_ends_drafts_are_awaited_by_the_next_of_its_slot(
    lookahead: int, tiny: Callable[[str], TinyModel]
) -> None:
    """Also where others of the slot go on before those that had drafts: pages are few."""
    model, limits = tiny("llama"), (20, 1, 3, 2, 8, 1)

    def sampling(number: int) -> SamplingParams:
        num_logprobs = 0 if number else -1  # one sequence alone may have drafts
        options = SamplingParams(max_new_tokens=limits[number], ignore_eos=True)
        return options.replace(num_logprobs=num_logprobs)

    requests = make_requests((8, 24, 25, 12, 12, 12), sampling)
    wanted = [outcome.token_ids for outcome in plain_outcomes(model, requests)]
    plan = engine_plan(
        2,
        max_sequences=2,
        lookahead=lookahead,
        drafted_rows=8,
        num_pages=12,
        max_tokens_per_step=8,
    )
    pipeline = EnginePipeline(model, plan, "varlen").prepare()
    for seed in range(4):
        drafter = ForetellingDrafter(wanted, seed)
        found = pipeline.generate(requests, seed=seed, drafter=drafter)
        assert [outcome.token_ids for outcome in found] == wanted
        assert pipeline.drafts.num_drafted > 0


@pytest.mark.parametrize("mode", MODES)
def test_a_step_with_drafts_has_a_graph_though_slots_have_one_sequence(
    mode: str, tiny: Callable[[str], TinyModel]
) -> None:
    model, requests = tiny("llama"), greedy_requests(30)[:1]
    wanted = model.greedy(requests[0].prompt_ids, requests[0].sampling.max_new_tokens)
    plan = engine_plan(2, graphs=mode == "replayed", drafted_rows=8, max_sequences=1)
    pipeline = EnginePipeline(model, plan, mode).prepare()
    num_graphs = [engine.graph_runner.num_graphs for engine in pipeline.engines]
    assert num_graphs == [(mode == "replayed") * len(row_buckets(8)) * plan.num_slots] * 2
    (found,) = pipeline.generate(requests, drafter=ForetellingDrafter([wanted], 0))
    assert list(found.token_ids) == wanted
    assert pipeline.drafts.num_saved_steps == pipeline.drafts.num_accepted > 10
    assert [engine.graph_runner.num_graphs for engine in pipeline.engines] == num_graphs


# ---- sampling, against the plain path ------------------------------------------------------------


def sampled(number: int) -> SamplingParams:
    """Every option, and greedy rows between them."""
    options: list[dict[str, float]] = [
        {"temperature": 0.9},
        {},
        {"temperature": 1.5, "top_k": 20},
        {"temperature": 1.2, "top_p": 0.8},
        {"repetition_penalty": 1.7},
        {"temperature": 2.0, "min_p": 0.05, "repetition_penalty": 0.6},
        {"temperature": 1.0, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
        {"temperature": 1e-8, "top_k": 3},
        {"frequency_penalty": 1.3},
        {"presence_penalty": -1.5},
        {
            "temperature": 0.8,
            "repetition_penalty": 1.2,
            "frequency_penalty": -0.4,
            "presence_penalty": 2.0,
        },
    ]
    chosen: dict[str, float] = options[number % len(options)]
    return SamplingParams(
        **chosen,  # type: ignore[arg-type]
        max_new_tokens=8 + number % 4,
        seed=100 + number,
        ignore_eos=number % 2 == 0,
        num_logprobs=(-1, 0, 3, 200)[number % 4],
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_stages", [1, 3])
def test_every_sampling_option_gives_the_plain_paths_tokens_and_log_probabilities(
    num_stages: int, mode: str, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny("llama")
    requests = make_requests((*LENGTHS, *LENGTHS), sampled)
    wanted = plain_outcomes(model, requests)
    plan = engine_plan(num_stages, graphs=mode == "replayed")
    pipeline = EnginePipeline(model, plan, mode).prepare()
    found = pipeline.generate(requests)
    assert [o.token_ids for o in found] == [o.token_ids for o in wanted]
    assert [o.reason for o in found] == [o.reason for o in wanted]
    for ours, theirs, request in zip(found, wanted, requests, strict=True):
        if request.sampling.num_logprobs < 0:
            assert not any(ours.logprobs)
            continue
        assert len(ours.logprobs) == len(ours.token_ids)
        for mine, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert mine is not None
            assert other is not None
            assert mine.token_id == other.token_id
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert len(mine.top) == min(request.sampling.num_logprobs, 97)
            assert [v for _, v in mine.top] == pytest.approx([v for _, v in other.top], abs=1e-4)


def test_a_program_captured_in_the_middle_of_a_run_changes_no_token(
    tiny: Callable[[str], TinyModel],
) -> None:
    """Nothing but greedy is captured at boot, so each option's first step is a capture."""
    model = tiny("llama")
    requests = make_requests((*LENGTHS, *LENGTHS), sampled)
    for num_stages in (1, 2):
        plain = EnginePipeline(model, engine_plan(num_stages), "tensors").prepare()
        wanted = [o.token_ids for o in plain.generate(requests, seed=4)]
        late = EnginePipeline(model, engine_plan(num_stages, graphs=True), "replayed").prepare()
        assert isinstance(late.stream, ReplayingStream)
        num_at_boot = late.stream.num_captures
        assert [o.token_ids for o in late.generate(requests, seed=4)] == wanted
        num_after_one = late.stream.num_captures
        assert num_after_one > num_at_boot
        assert [o.token_ids for o in late.generate(requests, seed=4)] == wanted
        assert late.stream.num_captures == num_after_one


@pytest.mark.parametrize("num_stages", [1, 2])
def test_what_the_requests_use_is_captured_at_boot_and_nothing_later(
    num_stages: int, tiny: Callable[[str], TinyModel]
) -> None:
    """Two kinds of programs serve every mixture of the options, log-probabilities included."""
    model = tiny("llama")
    settings = [*map(sampled, range(2 * len(LENGTHS))), GREEDY.replace(max_new_tokens=9)]
    requests = make_requests((*LENGTHS, *LENGTHS, 6), lambda n: settings[n])
    wanted = plain_outcomes(model, requests)
    early = EnginePipeline(model, engine_plan(num_stages, graphs=True), "replayed")
    early.prepare(SamplingUse.of(request.sampling for request in requests))
    assert isinstance(early.stream, ReplayingStream)
    num_at_boot = early.stream.num_captures
    num_buckets = len(row_buckets(early.plan.max_sequences_per_slot))
    # Two on the last stage; where there are others, the first one's taking of ids.
    num_kinds = num_stages + 1 + (num_stages > 1)
    assert num_at_boot == num_kinds * num_buckets * early.plan.num_slots
    found = early.generate(requests)
    assert early.stream.num_captures == num_at_boot
    assert [o.token_ids for o in found] == [o.token_ids for o in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        chosen = [entry.logprob for entry in ours.logprobs if entry is not None]
        other = [entry.logprob for entry in theirs.logprobs if entry is not None]
        assert chosen == pytest.approx(other, abs=1e-4)


def test_graphs_keep_their_logits_in_one_place(tiny: Callable[[str], TinyModel]) -> None:
    plan = engine_plan(1, graphs=True, num_slots=2)
    pipeline = EnginePipeline(tiny("llama"), plan, "replayed")
    pipeline.prepare(SamplingUse(SamplingNeeds.DRAW, logprobs=True))
    (engine,) = pipeline.engines
    kept = [
        engine.graph_runner.run(GraphKey(slot, rows, SamplingNeeds.DRAW, with_logits=True))
        for rows in row_buckets(plan.max_sequences_per_slot)
        for slot in range(plan.num_slots)
    ]
    logits = [output.logits_BV for output in kept if output.logits_BV is not None]
    assert len(logits) == len(kept)
    assert len({tensor.untyped_storage().data_ptr() for tensor in logits}) == 1
    assert logits[0].untyped_storage().nbytes() == plan.max_sequences_per_slot * 97 * 4
    plain = engine.graph_runner.run(GraphKey(0, 1, SamplingNeeds.DRAW))
    assert plain.logits_BV is None, "the program with logits stands in, for the ids only"


def test_ids_that_leave_outlast_the_steps_of_other_slots(tiny: Callable[[str], TinyModel]) -> None:
    """They are sent beside the stream, and the captures of all slots share their memory."""
    plan = engine_plan(2, graphs=True)
    stream = PooledStream(torch.device("cpu"), ScriptedClock(), ProgressEngine())
    model = build_stage(tiny("llama"), plan, 1, TensorSdpa())
    engine = open_engine(plan, model, cache_of(model), stream, attention_needs_seq_lens=False)
    engine.prepare(SamplingUse())
    hidden_BH = engine.hidden_buffer(DecodeScheduled(0, 0, 2, (), (), (), (), False))
    hidden_BH.copy_(torch.randn(hidden_BH.shape, generator=torch.Generator().manual_seed(3)))
    kept = []
    for slot in range(plan.num_slots):
        for rows in row_buckets(plan.max_sequences_per_slot):
            ids_B = engine.graph_runner.run(GraphKey(slot, rows)).result
            assert ids_B.is_contiguous()
        kept.append((ids_B, ids_B.tolist()))
    for ids_B, wanted in kept:
        assert len(set(wanted)) > 1
        assert ids_B.tolist() == wanted


# ---- hard cases ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("num_stages", "first"), [(1, 5), (2, 0)])
def test_preempted_sequences_start_over_and_end_the_same(
    num_stages: int, first: int, mode: str, tiny: Callable[[str], TinyModel]
) -> None:
    """`first` of the options; what penalties count outlives the recomputation."""
    model = tiny("llama")
    requests = make_requests(
        (9, 3, 14, 6, 2, 11), lambda n: sampled(first + n).replace(max_new_tokens=20)
    )
    wanted = plain_outcomes(model, requests)
    plan = engine_plan(num_stages, num_pages=14, graphs=mode == "replayed", max_sequences=4)
    pipeline = EnginePipeline(model, plan, mode).prepare()
    num_preemptions = 0
    for seed in range(2):
        found = pipeline.generate(requests, seed=seed)
        assert [o.token_ids for o in found] == [o.token_ids for o in wanted]
        num_preemptions += pipeline.num_preemptions
    assert num_preemptions > 2


@pytest.mark.parametrize("mode", MODES)
def test_stop_ids_end_a_sequence_and_its_surplus_is_dropped(
    mode: str, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny("llama")
    free = [model.greedy(r.prompt_ids, 9) for r in greedy_requests()]
    stops = [tokens[number % 5] for number, tokens in enumerate(free)]
    requests = make_requests(
        LENGTHS, lambda n: GREEDY.replace(max_new_tokens=9, stop_token_ids=(stops[n],))
    )
    plan = engine_plan(2, graphs=mode == "replayed")
    found = EnginePipeline(model, plan, mode).prepare().generate(requests)
    for outcome, tokens, stop in zip(found, free, stops, strict=True):
        assert list(outcome.token_ids) == tokens[: tokens.index(stop) + 1]
        assert outcome.reason is FinishReason.STOP
    assert EOS not in stops


@pytest.mark.parametrize("mode", MODES)
def test_logits_that_are_not_finite_come_back_as_minus_one(
    mode: str, tiny: Callable[[str], TinyModel]
) -> None:
    """And only for the sequences concerned; what follows a -1 on the device does no harm."""
    model = tiny("llama")
    requests = greedy_requests()[:2]
    plan = engine_plan(1, graphs=mode == "replayed")
    pipeline = EnginePipeline(model, plan, mode).prepare()
    pipeline.generate(requests)
    weight = pipeline.models[0].module.lm_head.weight
    weight.data.fill_(float("nan"))
    (engine,) = pipeline.engines
    engine.open(RequestOpened(0, (5, 6, 7), GREEDY))
    first = engine.prefill(chunk(0, (0, 0, 3, (1,), True)), None)
    assert first.result.tolist() == [-1]
    second = engine.decode(DecodeScheduled(1, 0, 1, (), (0,), (), (), False), None)
    assert second.result.tolist() == [-1]
    third = engine.decode(DecodeScheduled(2, 0, 1, (), (), (0,), (2,), False), None)
    assert third.result.tolist() == [-1]
