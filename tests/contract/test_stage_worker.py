"""Workers, runner and scheduler of several virtual ranks in one event loop, on tiny models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpipipe.clock import MonotonicClock
from mpipipe.control_plane.group import RankGroup
from mpipipe.control_plane.memory import open_memory_channels
from mpipipe.control_plane.mesh import Mesh
from mpipipe.control_plane.messages import (
    GenerationBegan,
    GenerationEnded,
    SessionEnded,
    StepScheduled,
)
from mpipipe.data_plane.channel import EdgeKind, PendingTransfer, TensorChannel, Transfer
from mpipipe.data_plane.loopback import LoopbackChannel, open_loopback_channels
from mpipipe.errors import NumericsError, PromptError
from mpipipe.kv_cache.base import ContiguousKVCache
from mpipipe.metrics.accounting import StageAccount, StepRecord
from mpipipe.metrics.log import NullLog
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.workload import Workload
from mpipipe.progress import ProgressEngine, new_event_loop
from mpipipe.runtime.session import Session
from mpipipe.scheduler.core import SchedulerCore, SchedulerLimits
from mpipipe.scheduler.runner import Runner
from mpipipe.scheduler.texts import TextMaker
from mpipipe.stage.device_use import DeviceUse
from mpipipe.stage.launched import LaunchedStep
from mpipipe.stage.step_times import StepTimesLink
from mpipipe.stage.timeline import StreamTimeline
from mpipipe.stage.worker import StageWorker
from mpipipe.types import Completion, FinishReason, Request, SamplingParams
from tests.contract.engine_pipeline import (
    EOS,
    EnginePipeline,
    cache_of,
    engine_plan,
    make_requests,
    plain_outcomes,
)
from tests.contract.tiny_models import TinyModel

LIMIT_S = 60
LENGTHS = (5, 11, 3, 18, 7, 1, 26, 4)
MODES = ["varlen", "replayed"]
_TURNS = 100  # of the event loop, for which a slow stage holds up a tensor


def text_of(ids: Sequence[int]) -> str:
    return "".join(chr(0x100 + token_id) for token_id in ids)


@dataclass
class Rank:
    """A virtual rank."""

    mesh: Mesh
    worker: StageWorker
    account: StageAccount
    told: list[tuple[StepRecord, float | None]] = field(default_factory=list)  # by the account
    times_s: list[float] = field(default_factory=list)  # of each call, when it began and ended


def noted(book: Callable[[float], None], times_s: list[float]) -> Callable[[float], None]:
    """`book`, which is told a time, and notes it."""

    def book_and_note(now_s: float) -> None:
        times_s.append(now_s)
        book(now_s)

    return book_and_note


class SlowReceiver:
    """Receives for a last stage that is slow, and notes how many tensors were sent to it by then.

    Args:
        channel: the last stage's end.
        sender: the end of the only other stage.
    """

    def __init__(self, channel: LoopbackChannel, sender: LoopbackChannel) -> None:
        self.most_waiting = 0
        self.send = channel.send
        self.aclose = channel.aclose
        self._channel = channel
        self._num_waiting = 0
        self._sender_sends = sender.send
        sender.send = self._counted  # type: ignore[method-assign]

    def _counted(
        self, tensor: torch.Tensor, *, destination: int, kind: EdgeKind
    ) -> PendingTransfer:
        self._num_waiting += 1
        return self._sender_sends(tensor, destination=destination, kind=kind)

    def receive(self, buffer: torch.Tensor, *, source: int, kind: EdgeKind) -> Transfer:
        """Nothing is received before a caller waits for it, and not at once then."""
        return _SlowTransfer(self, buffer, source, kind)

    async def take(self, buffer: torch.Tensor, source: int, kind: EdgeKind) -> None:
        """Let the others run on first: the compute thread too, until a second chunk waits."""
        is_chunk = len(buffer) > 1  # and no trial of the edge, behind which nothing comes
        while is_chunk and self.most_waiting < 2 and self._num_waiting < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        self.most_waiting = max(self.most_waiting, self._num_waiting)
        await self._channel.receive(buffer, source=source, kind=kind).wait()
        self._num_waiting -= 1


@dataclass
class _SlowTransfer:
    receiver: SlowReceiver
    buffer: torch.Tensor
    source: int
    kind: EdgeKind

    async def wait(self) -> None:
        await self.receiver.take(self.buffer, self.source, self.kind)


class VirtualRanks:
    """All ranks of `pipeline`, wired as `runtime` wires them.

    Args:
        pipeline: its engines, prepared.
        slow: the last of two stages is slow to receive.
    """

    def __init__(self, pipeline: EnginePipeline, *, slow: bool = False) -> None:
        self._is_slow = slow
        self.pipeline = pipeline
        self.plan: PipelinePlan = pipeline.plan
        self.ranks: list[Rank] = []
        self.told_end_s: list[float] = []  # when the head ended each call
        self.slow: SlowReceiver | None = None  # the second of two stages

    def generate(self, *calls: Sequence[Request]) -> list[list[Completion]]:
        """One generate call after the other, then the end of the session."""
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(self._session(calls))

    async def _session(self, calls: Sequence[Sequence[Request]]) -> list[list[Completion]]:
        progress, clock = ProgressEngine(), MonotonicClock()
        channels = open_memory_channels(self.plan.num_stages, progress)
        tensors = open_loopback_channels(self.plan.num_stages)
        self.ranks = []
        for number, engine in enumerate(self.pipeline.engines):
            mesh = Mesh(channels[number], progress, clock)
            account = StageAccount(number)
            end: TensorChannel = tensors[number]
            if self._is_slow and number == 1:
                end = self.slow = SlowReceiver(tensors[1], tensors[0])
            told: list[tuple[StepRecord, float | None]] = []
            account.on_step = lambda record, transfer_s, told=told: told.append(
                (record, transfer_s)
            )
            link = None
            if self.plan.num_stages > 1:
                link = StepTimesLink(
                    self.plan,
                    number,
                    mesh=mesh,
                    account=account,
                    clock=clock,
                    ahead_s=lambda _: 0.0,
                )
            worker = StageWorker(
                plan=self.plan,
                stage=self.plan.stages[number],
                mesh=mesh,
                channel=end,
                engine=engine,
                stream=self.pipeline.stream,
                timeline=StreamTimeline(self.pipeline.stream, account, clock, link),
                progress=progress,
                clock=clock,
            )
            self.ranks.append(rank := Rank(mesh, worker, account, told))
            for name in ("begin", "end"):
                setattr(account, name, noted(getattr(account, name), rank.times_s))
        completed: list[list[Completion]] = []
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            polling = tasks.create_task(progress.run())
            for rank in self.ranks:
                rank.mesh.start()
            await asyncio.gather(*(rank.worker.exercise_edges() for rank in self.ranks))
            for requests in calls:
                completed.append(await self._call(tasks, requests))  # noqa: PERF401
            await asyncio.gather(*(rank.worker.settle() for rank in self.ranks))
            ending = [tasks.create_task(rank.worker.serve()) for rank in self.ranks]
            self.ranks[0].mesh.broadcast_message(SessionEnded())
            assert await asyncio.gather(*ending) == [False] * len(ending)
            polling.cancel()
        return completed

    async def _call(
        self, tasks: asyncio.TaskGroup, requests: Sequence[Request]
    ) -> list[Completion]:
        plan = self.plan
        core = SchedulerCore(
            SchedulerLimits(
                plan.num_slots,
                plan.max_sequences_per_slot,
                plan.max_tokens_per_step,
                plan.num_kv_pages,
                plan.page_size_tokens,
                plan.max_sequence_tokens,
                plan.lookahead,
            ),
            eos_token_ids=(EOS,),
            prefill="mixed" if plan.prefill == "mixed" else "phases",
        )
        runner = Runner(
            core=core,
            group=RankGroup(self.ranks[0].mesh, range(len(self.ranks))),
            texts=TextMaker(text_of),
            clock=MonotonicClock(),
            log=NullLog(),
        )
        self.ranks[0].mesh.broadcast_message(GenerationBegan())
        serving = [tasks.create_task(rank.worker.serve()) for rank in self.ranks]
        completions = [completion async for completion in runner.generate(requests)]
        self.told_end_s.append(MonotonicClock().now_s())
        self.ranks[0].mesh.broadcast_message(GenerationEnded())
        assert await asyncio.gather(*serving) == [True] * len(serving)
        assert core.is_idle
        return sorted(completions, key=lambda completion: completion.index)


def virtual(model: TinyModel, num_stages: int, mode: str, **shape: int) -> VirtualRanks:
    plan = engine_plan(num_stages, graphs=mode == "replayed", **shape)  # type: ignore[arg-type]
    return VirtualRanks(EnginePipeline(model, plan, mode).prepare())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_two_calls_of_one_session_give_the_tokens_of_transformers(
    num_stages: int, mode: str, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny("llama")
    requests = make_requests(
        LENGTHS, lambda n: SamplingParams(max_new_tokens=6 + n % 4, ignore_eos=True)
    )
    wanted = [model.greedy(r.prompt_ids, r.sampling.max_new_tokens) for r in requests]
    ranks = virtual(model, num_stages, mode)
    first, second = ranks.generate(requests, requests[::-1])
    assert [list(c.token_ids) for c in first] == wanted
    assert [list(c.token_ids) for c in second] == wanted
    assert all(c.finish_reason is FinishReason.LENGTH for c in first)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_options_stop_strings_and_preemption_change_no_completion(
    num_stages: int, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny("llama")
    settings = [
        SamplingParams(max_new_tokens=18, temperature=1.1, seed=3),
        SamplingParams(
            max_new_tokens=18, repetition_penalty=1.4, presence_penalty=-0.3, num_logprobs=2
        ),
        SamplingParams(max_new_tokens=18, temperature=0.8, top_p=0.7, num_logprobs=0, seed=4),
        SamplingParams(max_new_tokens=18, ignore_eos=True),
    ]
    requests = make_requests(LENGTHS, lambda n: settings[n % 4])
    ((*free,),) = virtual(model, 1, "varlen").generate(requests)
    stops = {completion.index: completion.text[2:4] for completion in free}
    stopping = make_requests(LENGTHS, lambda n: settings[n % 4].replace(stop=(stops[n],)))
    ranks = virtual(model, num_stages, "replayed", num_pages=14, max_sequences=4)
    again, stopped = ranks.generate(requests, stopping)
    assert [c.token_ids for c in again] == [c.token_ids for c in free]
    for completion, cut in zip(free, stopped, strict=True):
        assert cut.finish_reason is FinishReason.STOP
        assert cut.text == completion.text[: completion.text.index(stops[cut.index])]
    for completion in (*again, *stopped):
        asked = settings[completion.index % 4].num_logprobs
        if asked < 0:
            assert completion.logprobs is None
        else:
            assert completion.logprobs is not None
            assert [e.token_id for e in completion.logprobs] == list(completion.token_ids)
            assert all(len(e.top) == asked for e in completion.logprobs)


@pytest.mark.parametrize(
    "shape",
    [
        {"lookahead": 0, "prefill": "mixed"},
        {"lookahead": 0, "prefill": "mixed", "num_slots": 1, "max_sequences": 8},
        {"lookahead": 0, "prefill": "mixed", "max_tokens_per_step": 4, "num_pages": 14},
        {"lookahead": 0, "prefill": "mixed", "kv_cache": "contiguous"},
        {"lookahead": 2, "max_sequences": 2},
    ],
    ids=["awaiting", "one-slot", "preemption", "contiguous", "two-rounds-ahead"],
)
@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_tokens_do_not_depend_on_how_far_steps_are_ahead_or_how_they_are_filled(
    num_stages: int, shape: dict[str, Any], tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny("llama")
    settings = [
        SamplingParams(max_new_tokens=16, temperature=1.1, seed=3, ignore_eos=True),
        SamplingParams(max_new_tokens=12, repetition_penalty=1.4, num_logprobs=2),
        SamplingParams(max_new_tokens=14, ignore_eos=True),
    ]
    requests = make_requests(LENGTHS, lambda n: settings[n % 3])
    wanted = plain_outcomes(model, requests)
    plan = engine_plan(num_stages, num_slots=shape.pop("num_slots", max(2, num_stages)), **shape)
    ranks = VirtualRanks(EnginePipeline(model, plan, "varlen").prepare())
    for completions in ranks.generate(requests, requests):
        assert [c.token_ids for c in completions] == [o.token_ids for o in wanted]
        for completion, outcome in zip(completions, wanted, strict=True):
            chosen = [entry.logprob for entry in completion.logprobs or ()]
            other = [entry.logprob for entry in outcome.logprobs if entry is not None]
            assert chosen == pytest.approx(other, abs=1e-4)
    for stage in ranks.pipeline.models:
        cache = cache_of(stage)
        assert not isinstance(cache, ContiguousKVCache) or not cache.entries, "all are forgotten"


@pytest.mark.parametrize("num_pages", [14, 200])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_prompts_ride_in_decode_steps_beside_graphs(
    num_stages: int, num_pages: int, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny("llama")
    settings = [
        SamplingParams(max_new_tokens=16, temperature=1.1, seed=3, ignore_eos=True),
        SamplingParams(max_new_tokens=12, repetition_penalty=1.4, num_logprobs=2),
        SamplingParams(max_new_tokens=1),  # it rides, and never joins: the rows do not change
    ]
    requests = make_requests((*LENGTHS, *LENGTHS), lambda n: settings[n % 3])
    wanted = [outcome.token_ids for outcome in plain_outcomes(model, requests)]
    shape: dict[str, Any] = {"prefill": "mixed", "max_tokens_per_step": 8, "num_pages": num_pages}
    ranks = virtual(model, num_stages, "replayed", max_sequences=4, **shape)
    for completions in ranks.generate(requests, requests):
        assert [completion.token_ids for completion in completions] == wanted


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_the_compute_thread_ends_the_session_with_it(
    failing: int, tiny: Callable[[str], TinyModel]
) -> None:
    def fail(step: StepScheduled, hidden_TH: torch.Tensor | None) -> LaunchedStep:
        raise RuntimeError(f"step {step.step} has failed")

    ranks = virtual(tiny("llama"), 2, "varlen")
    engine: Any = ranks.pipeline.engines[failing]
    engine.prefill = fail
    with pytest.raises(BaseExceptionGroup) as caught:
        ranks.generate(make_requests(LENGTHS, lambda n: SamplingParams(max_new_tokens=6)))
    assert caught.group_contains(RuntimeError, match="step 0 has failed")


def test_the_first_stage_does_not_run_away_with_chunks_of_a_long_prompt(
    tiny: Callable[[str], TinyModel],
) -> None:
    """Steps that sample nothing are in flight until the last stage is through with them."""
    model = tiny("llama")
    requests = make_requests((40, 40), lambda n: SamplingParams(max_new_tokens=4, ignore_eos=True))
    plan = engine_plan(2, max_tokens_per_step=3)
    ranks = VirtualRanks(EnginePipeline(model, plan, "varlen").prepare(), slow=True)
    (completions,) = ranks.generate(requests)
    wanted = [model.greedy(r.prompt_ids, r.sampling.max_new_tokens) for r in requests]
    assert [list(c.token_ids) for c in completions] == wanted
    assert ranks.slow is not None
    assert ranks.slow.most_waiting <= plan.num_slots * (1 + plan.lookahead)


def test_a_session_admits_what_its_stages_were_planned_for_and_no_more() -> None:
    """Else a sequence would outgrow the page tables and the rotary table of the stages."""
    plan = engine_plan(1)
    boot: Any = SimpleNamespace(
        ranks=SimpleNamespace(mesh=None),
        resources=(),
        model=SimpleNamespace(spec=SimpleNamespace(eos_token_ids=(EOS,))),
        prepared=SimpleNamespace(tokenizer=None, decode=text_of, workload=Workload()),
        log=NullLog(),
        kernels=None,
    )
    nothing: Any = None
    session = Session(
        boot, plan=plan, worker=nothing, account=nothing, clocks=nothing, load=nothing
    )
    core = session._make_core()
    fitting, longer = make_requests(
        (8, 8), lambda n: SamplingParams(max_new_tokens=plan.max_sequence_tokens - 8 + n)
    )
    core.add(fitting)
    with pytest.raises(PromptError, match=f"at most {plan.max_sequence_tokens}"):
        core.add(longer)


def test_every_second_of_every_rank_is_booked(tiny: Callable[[str], TinyModel]) -> None:
    requests = make_requests(LENGTHS, lambda n: SamplingParams(max_new_tokens=6, ignore_eos=True))
    plan = engine_plan(2)
    ranks = VirtualRanks(EnginePipeline(tiny("llama"), plan, "varlen", MonotonicClock()).prepare())
    ranks.generate(requests)
    for rank in ranks.ranks:
        totals = rank.account.snapshot()
        assert totals.num_sampled == 6 * len(LENGTHS)
        assert totals.overall.compute_s > 0
        # From the head's word that the call begins, which is before any step, to its word that it
        # ends. The second `serve` only hears that the session is over.
        begun_s, ended_s = rank.times_s
        assert begun_s <= rank.told[0][0].scheduled_s
        assert ended_s >= ranks.told_end_s[0] > rank.told[-1][0].compute_end_s - 1e-6
        assert totals.overall.wall_s == pytest.approx(ended_s - begun_s, abs=1e-6)
        assert totals.overall.overhead_s > 0, "handing work to the thread takes a moment"
        assert rank.worker.device_use() == DeviceUse(), "on a CPU computing is the host's time"


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_each_stage_knows_of_every_step_how_its_wait_divides(
    num_stages: int, tiny: Callable[[str], TinyModel]
) -> None:
    requests = make_requests(LENGTHS, lambda n: SamplingParams(max_new_tokens=12, ignore_eos=True))
    plan = engine_plan(num_stages)
    ranks = VirtualRanks(EnginePipeline(tiny("llama"), plan, "varlen", MonotonicClock()).prepare())
    ranks.generate(requests, requests)
    computed_s = [[record.compute_end_s for record, _ in rank.told] for rank in ranks.ranks]
    for number, rank in enumerate(ranks.ranks):
        totals = rank.account.snapshot()
        assert len(rank.told) == totals.num_steps > 64, "more than one batch of times"
        assert totals.num_undivided == 0
        transfers_s = [transfer_s for _, transfer_s in rank.told if transfer_s is not None]
        assert len(transfers_s) == len(rank.told)
        assert totals.overall.transfer_s == pytest.approx(sum(transfers_s), abs=1e-6)
        if number:  # all virtual ranks have one clock
            for (record, transfer_s), done_s in zip(rank.told, computed_s[number - 1], strict=True):
                waited_from_s = min(max(record.scheduled_s, done_s), record.input_ready_s)
                assert transfer_s == pytest.approx(record.input_ready_s - waited_from_s, abs=2e-9)
    if num_stages == 1:
        assert totals.overall.transfer_s == totals.bytes_in == totals.bytes_out == 0
        return
    ends = [rank.account.snapshot() for rank in ranks.ranks]
    sent = [stage.bytes_out for stage in ends]
    assert [stage.bytes_in for stage in ends] == [sent[-1], *sent[:-1]], "what one sends"
    num_rows = sum(record.num_tokens for record, _ in ranks.ranks[0].told)
    assert sent[0] == num_rows * plan.hidden_size * 4
    assert sum(transfer_s or 0.0 for _, transfer_s in ranks.ranks[1].told) > 0


@pytest.mark.parametrize("num_stages", [2, 3])
def test_with_graphs_the_ids_are_bytes_too(
    num_stages: int, tiny: Callable[[str], TinyModel]
) -> None:
    requests = make_requests(LENGTHS, lambda n: SamplingParams(max_new_tokens=6, ignore_eos=True))
    ranks = virtual(tiny("llama"), num_stages, "replayed")
    ranks.generate(requests)
    ends = [rank.account.snapshot() for rank in ranks.ranks]
    assert ends[-1].bytes_out == ends[0].bytes_in > 8 * 6 * len(LENGTHS), "with rows of padding"
    assert all(stage.num_undivided == 0 for stage in ends)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_logits_that_are_not_finite_end_the_run_with_an_error(
    num_stages: int, tiny: Callable[[str], TinyModel]
) -> None:
    requests = make_requests(LENGTHS, lambda n: SamplingParams(max_new_tokens=6, ignore_eos=True))
    ranks = virtual(tiny("llama"), num_stages, "varlen")
    ranks.pipeline.models[-1].module.lm_head.weight.data[7] = float("nan")
    with pytest.raises(BaseExceptionGroup) as caught:
        ranks.generate(requests)
    assert caught.group_contains(
        NumericsError, match=r"not finite for \d of \d sequences of step 0"
    )
