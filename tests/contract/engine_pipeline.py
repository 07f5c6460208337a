"""The launch-ahead engines of a tiny model, fed by the real scheduler; tensors passed by hand.

Three ways to run decode steps: `varlen` (from lengths that the host knows), `tensors` (the programs
as they are), and `replayed` (the programs recorded once and replayed on the same addresses, as a
CUDA graph would be). The oracle is the plain path: `AwaitingCore` and `StageExecutor`.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch

from mpipipe.checkpoint.spec import read_spec
from mpipipe.clock import Clock, ScriptedClock
from mpipipe.control_plane.messages import (
    DecodeScheduled,
    RequestClosed,
    RequestOpened,
    StepScheduled,
)
from mpipipe.kv_cache.base import ContiguousKVCache, KVCache
from mpipipe.kv_cache.host_pages import page_bytes
from mpipipe.kv_cache.paged import HostLayers, PagedKVCache
from mpipipe.metrics.drafts import DraftUse
from mpipipe.models.adapter import StageModel
from mpipipe.models.attention.base import AttentionBackend
from mpipipe.models.attention.sdpa import SdpaAttention
from mpipipe.models.attention.triton_paged import TritonAttention
from mpipipe.planning.plan import DraftPlan, PipelinePlan
from mpipipe.planning.workload import SamplingUse
from mpipipe.progress import ProgressEngine
from mpipipe.scheduler.core import SchedulerCore, SchedulerLimits
from mpipipe.scheduler.drafts import Drafter
from mpipipe.scheduler.instructions import Closed, Finished, Instruction
from mpipipe.scheduler.sequence import Sequence as SequenceRecord
from mpipipe.stage.assembly import open_engine, open_stream
from mpipipe.stage.device_logprobs import logprobs_of
from mpipipe.stage.engine import StageEngine
from mpipipe.stage.launched import LaunchedStep
from mpipipe.stage.stream import Stream
from mpipipe.types import (
    CacheKind,
    FinishReason,
    PrefillMode,
    Request,
    SamplingParams,
    TokenLogprobs,
)
from mpipipe.weights.pinned_memory import PinnedMemory, device_view
from tests.contract.replaying_stream import ReplayingStream
from tests.contract.tiny_models import (
    NUM_LAYERS,
    PAGE_SIZE,
    Offloading,
    TinyModel,
    load_stage,
    split,
)
from tests.oracles.awaiting_core import AwaitingCore
from tests.oracles.plain_stage import PreparedStep, SequenceTable, StageExecutor

MAX_TOKENS = 48  # of a sequence
EOS = 2
Step = StepScheduled | DecodeScheduled


class TensorSdpa(SdpaAttention):
    """SDPA that is trusted with decode steps from device tensors alone."""

    needs_seq_lens = False


# ---- the pipeline --------------------------------------------------------------------------------


def engine_plan(
    num_stages: int,
    *,
    num_slots: int | None = None,
    max_sequences: int = 3,
    num_pages: int = 60,
    max_tokens_per_step: int = 16,
    graphs: bool = False,
    prefill: PrefillMode = "phases",
    hidden_size: int = 48,
    lookahead: int = 1,
    kv_cache: CacheKind = "paged",
    num_host_pages: int = 0,
    drafted_rows: int = 0,
    max_sharing_tokens: int = 0,
    read_prefixes_once: bool = False,
) -> PipelinePlan:
    """A plan of one in-process machine, in float32."""
    return PipelinePlan(
        model_path="",
        model_type="llama",
        architecture="",
        dtype="float32",
        num_layers=NUM_LAYERS,
        hidden_size=hidden_size,
        stages=tuple(split(num_stages)),
        num_slots=num_slots or num_stages,
        max_sequences_per_slot=max_sequences,
        max_tokens_per_step=max_tokens_per_step,
        page_size_tokens=PAGE_SIZE,
        num_kv_pages=num_pages,
        max_context_tokens=64,
        kv_cache=kv_cache,
        transport="loopback",
        device="cpu",
        attention="sdpa",
        threads_per_rank=1,
        resolved=(),
        lookahead=lookahead,
        prefill=prefill,
        cuda_graphs=graphs,
        max_sequence_tokens=MAX_TOKENS,
        num_host_pages=num_host_pages,
        drafts=DraftPlan(7, (drafted_rows,), (1.0,), 0.0) if drafted_rows else None,
        max_sharing_tokens=max_sharing_tokens,
        read_prefixes_once=read_prefixes_once,
    )


class ForetellingDrafter:
    """Drafts what the sequences will go on with, now and then with a mistake."""

    def __init__(self, wanted: Sequence[Sequence[int]], seed: int, max_rows: int = 8) -> None:
        self.max_rows, self.max_sequences, self.alone = max_rows, max_rows // 2, False
        self._wanted = wanted
        self._random = Random(seed)

    def expects_gain(self, sequences: Sequence[SequenceRecord]) -> bool:
        return self._random.random() < 0.7

    def propose(
        self, sequences: Sequence[SequenceRecord], rooms: Sequence[int]
    ) -> list[tuple[int, ...]]:
        if self._random.random() < 0.2:
            return []
        most = self.max_rows // len(sequences) - 1
        return [
            self._draft(sequence, self._random.randint(0, min(most, room)))
            for sequence, room in zip(sequences, rooms, strict=True)
        ]

    def _draft(self, sequence: SequenceRecord, num_tokens: int) -> tuple[int, ...]:
        num_outputs = len(sequence.tokens) - len(sequence.request.prompt_ids)
        coming = self._wanted[sequence.sequence_id][num_outputs : num_outputs + num_tokens]
        return tuple(i if self._random.random() < 0.8 else abs(i - 1) for i in coming)


def build_stage(
    model: TinyModel,
    plan: PipelinePlan,
    number: int,
    backend: AttentionBackend,
    device: str = "cpu",
    offloading: Offloading | None = None,
    pinned: PinnedMemory | None = None,
) -> StageModel:
    """Stage `number`, with pages of its own and the one that belongs to no sequence."""
    config = model.reference.config
    heads = config.num_attention_heads
    stage = plan.stages[number]
    cache: KVCache = ContiguousKVCache()
    if plan.kv_cache == "paged":
        cache = PagedKVCache.allocate(
            num_layers=stage.num_layers,
            num_pages=plan.num_kv_pages + 1,
            page_size=PAGE_SIZE,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=torch.float32,
            device=torch.device(device),
            head_major=backend.head_major,
            host=host_layers(plan, number, device, pinned),
        )
    return load_stage(
        model.folder,
        stage,
        backend=backend,
        cache=cache,
        mode="plain" if device == "cpu" else "auto",
        device=device,
        max_sequence_tokens=64,
        offloading=offloading,
    )


def host_layers(
    plan: PipelinePlan, number: int, device: str, pinned: PinnedMemory | None
) -> HostLayers | None:
    """As `open_kv_memory` has them; `pinned` gives the memory."""
    stage = plan.stages[number]
    if stage.kv_in_host is None or not stage.kv_in_host.layers:
        return None
    pinned = pinned or PinnedMemory(torch.device(device))
    layers = tuple(layer - stage.first_layer for layer in stage.kv_in_host.layers)
    return HostLayers(layers, lambda num_bytes: seen(pinned.take(num_bytes), device))


def seen(memory: torch.Tensor, device: str) -> torch.Tensor:
    """Host memory as kernels of the device read it."""
    return memory if device == "cpu" else device_view(memory, torch.device(device))


def cache_of(stage: StageModel) -> KVCache:
    """The cache that the stage was finished with."""
    cache = stage._context.cache
    assert cache is not None
    return cache


@dataclass
class Outcome:
    """What became of a request."""

    token_ids: tuple[int, ...]
    reason: FinishReason
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)


@dataclass(frozen=True)
class _Flight:
    """A step that every stage has computed, and whose ids are on their way to stage 0."""

    step: Step
    request_rows_S: torch.Tensor
    ids_S: torch.Tensor | None
    logprobs: tuple[TokenLogprobs | None, ...] | None


class EnginePipeline:
    """Head and stages in one.

    Args:
        model: saved.
        plan: of any number of stages.
        mode: "varlen", "tensors" or "replayed"; on a GPU the latter two run our kernels.
        clock: of the stream.
        device: of all stages.
        offloading: where the plan offloads weights.
        backend: attention; None: as `mode` and `device` say.
        stream: of all stages; None: as `mode` and `device` say.
    """

    def __init__(
        self,
        model: TinyModel,
        plan: PipelinePlan,
        mode: str,
        clock: Clock | None = None,
        device: str = "cpu",
        offloading: Offloading | None = None,
        backend: AttentionBackend | None = None,
        stream: Stream | None = None,
    ) -> None:
        self.plan = plan
        self._restart_tokens = read_spec(model.folder).rotary.restart_tokens
        if backend is None:
            by_tensors = TensorSdpa() if device == "cpu" else TritonAttention()
            backend = SdpaAttention() if mode == "varlen" else by_tensors
        self.stream: Stream
        self.pinned = PinnedMemory(torch.device(device))
        # What is freed while it is pinned makes CUDA refuse copies of what is allocated there next.
        weakref.finalize(self, _unpin, torch.device(device), self.pinned)
        stages = range(plan.num_stages)
        self.models = [
            build_stage(model, plan, n, backend, device, offloading, self.pinned) for n in stages
        ]
        clock = clock or ScriptedClock()
        if stream is not None:
            self.stream = stream
        elif mode == "replayed" and device == "cpu":
            self.stream = ReplayingStream(torch.device(device), clock, ProgressEngine())
        else:
            self.stream = open_stream(torch.device(device), clock, ProgressEngine())
        self.engines = [
            open_engine(
                plan,
                stage,
                cache_of(stage),
                self.stream,
                attention_needs_seq_lens=backend.needs_seq_lens,
                host_memory=self._host_memory(stage),
            )
            for stage in self.models
        ]
        self.steps: list[Step] = []
        self.num_preemptions = 0
        self.num_saved = 0
        self.drafts = DraftUse()
        self.num_shared_tokens = 0
        self._returning: deque[_Flight] = deque()  # not yet taken by stage 0
        self._arrived: deque[_Flight] = deque()  # on the head's desk

    def prepare(self, use: SamplingUse | None = None) -> EnginePipeline:
        """As at boot."""
        for engine in self.engines:
            engine.prepare(use or SamplingUse())
        return self

    def generate(
        self, requests: Sequence[Request], *, seed: int = 0, drafter: Drafter | None = None
    ) -> list[Outcome]:
        """Complete all requests. `seed` decides how late the head hears of each step."""
        rng, plan = Random(seed), self.plan
        core = SchedulerCore(
            SchedulerLimits(
                plan.num_slots,
                plan.max_sequences_per_slot,
                plan.max_tokens_per_step,
                plan.num_kv_pages,
                plan.page_size_tokens,
                plan.max_sequence_tokens,
                plan.lookahead,
                num_host_pages=plan.num_host_pages,
                max_sharing_tokens=plan.max_sharing_tokens,
            ),
            eos_token_ids=(EOS,),
            prefill=plan.prefill,
            restart_tokens=self._restart_tokens,
            drafter=drafter,
        )
        outcomes: dict[int, Outcome] = {}
        logprobs: dict[int, list[TokenLogprobs | None]] = {n: [] for n in range(len(requests))}
        for request in requests:
            core.add(request)
        while not core.is_idle:
            step = core.next_step()
            for move in core.take_page_moves():
                for engine in self.engines:
                    engine.move_pages(move)
            if step is not None:
                self._send(core, step, requests)
            if step is None or rng.random() < 0.3:
                self._hear(core, outcomes, logprobs)
        self.num_preemptions = core.statistics().num_preemptions
        self.num_saved = core.statistics().num_saved
        self.drafts = core.statistics().drafts
        self.num_shared_tokens = core.statistics().num_shared_tokens
        for engine in self.engines:
            engine.clear()
            assert not len(engine.request_table), "a sequence was never closed"
        for number, outcome in outcomes.items():
            outcome.logprobs = logprobs[number][: len(outcome.token_ids)]
        return [outcomes[number] for number in range(len(requests))]

    def _host_memory(self, stage: StageModel) -> torch.Tensor | None:
        """As `open_kv_memory` makes it."""
        if not self.plan.num_host_pages:
            return None
        cache = cache_of(stage)
        assert isinstance(cache, PagedKVCache)
        device = cache.pages_NPX.device
        memory = self.pinned.take(self.plan.num_host_pages * page_bytes(cache))
        if memory.device == device or self.pinned.refused_bytes:
            return memory
        return device_view(memory, device)

    def close(self) -> None:
        """Unpin what pages were saved in."""
        _unpin(self.stream.device, self.pinned)

    # ---- towards the stages ----------------------------------------------------------------------

    def _send(self, core: SchedulerCore, step: Step, requests: Sequence[Request]) -> None:
        chunks = step.sequences if isinstance(step, StepScheduled) else step.chunks
        for scheduled in chunks:
            if core.begins(scheduled.sequence_id, step.step):
                known = core.known_tokens(scheduled.sequence_id)
                request = requests[scheduled.sequence_id]
                message = RequestOpened(
                    scheduled.sequence_id,
                    known,
                    request.sampling,
                    core.rotary_len(scheduled.sequence_id),
                    num_output_tokens=len(known) - len(request.prompt_ids),
                )
                for engine in self.engines:
                    engine.open(message)
        self.steps.append(step)
        self._take_needed(step)
        first = last = _launch(self.engines[0], step, None)
        for engine in self.engines[1:]:
            last = _launch(engine, step, last.result)
        ids_S = last.result.clone() if step.num_sampled else None
        self.stream.drain()  # log-probabilities are read now
        self._returning.append(_Flight(step, first.request_rows_S, ids_S, _host_logprobs(last)))

    def _take_needed(self, step: Step) -> None:
        """What the first stage's worker must have received; no sooner, to be nasty."""
        if isinstance(step, DecodeScheduled):
            needed = self.engines[0].needed_sample(step)
            while self._returning and self._returning[0].step.step <= needed:
                self._take_ids()

    def _take_ids(self) -> None:
        flight = self._returning.popleft()
        if flight.ids_S is not None and len(self.engines) > 1:
            with torch.inference_mode():
                ids_S = flight.ids_S
                if isinstance(flight.step, DecodeScheduled):  # as the worker receives them
                    ids_S = self.engines[0].ids_buffer(len(flight.request_rows_S)).copy_(ids_S)
                self.engines[0].take_ids(flight.request_rows_S, ids_S)
        self._arrived.append(flight)

    # ---- back from the stages --------------------------------------------------------------------

    def _hear(
        self,
        core: SchedulerCore,
        outcomes: dict[int, Outcome],
        logprobs: dict[int, list[TokenLogprobs | None]],
    ) -> None:
        if not self._arrived and self._returning:
            self._take_ids()
        if not self._arrived:
            return
        flight = self._arrived.popleft()
        sampled = core.logprob_rows(flight.step.step)
        if sampled:
            assert flight.logprobs is not None
            for sequence_id, entry in zip(sampled, flight.logprobs, strict=True):
                logprobs[sequence_id].append(entry)
        else:
            assert flight.logprobs is None, "the head does not expect them"
        ids: list[int] = [] if flight.ids_S is None else flight.ids_S.tolist()
        del ids[flight.step.num_sampled :]  # of rows without a sequence
        assert min(ids, default=0) >= 0, f"step {flight.step.step}: logits are not finite"
        self._carry_out(core.sampled(flight.step.step, ids), outcomes)
        while accepted := core.accepted():
            self._carry_out(accepted, outcomes)

    def _carry_out(self, instructions: Sequence[Instruction], outcomes: dict[int, Outcome]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Finished):
                outcomes[instruction.sequence_id] = Outcome(
                    instruction.token_ids, instruction.reason
                )
            elif isinstance(instruction, Closed):
                for engine in self.engines:
                    engine.close(RequestClosed(instruction.sequence_ids).sequence_ids)


def _launch(engine: StageEngine, step: Step, hidden_TH: torch.Tensor | None) -> LaunchedStep:
    """One stage's share, with the hidden states brought to where the engine wants them."""
    if hidden_TH is not None:
        buffer_TH = engine.hidden_buffer(step)
        hidden_TH = buffer_TH.copy_(hidden_TH)
    if isinstance(step, DecodeScheduled):
        return engine.decode(step, hidden_TH)
    return engine.prefill(step, hidden_TH)


def _host_logprobs(launched: LaunchedStep) -> tuple[TokenLogprobs | None, ...] | None:
    found = launched.logprobs
    if found is None:
        return None
    return logprobs_of(
        found.ids_S, found.chosen_S, found.top_ids_SK, found.top_values_SK, found.num_top
    )


# ---- the oracle ----------------------------------------------------------------------------------


def plain_outcomes(
    model: TinyModel, requests: Sequence[Request], *, num_pages: int = 60
) -> list[Outcome]:
    """What the awaiting scheduler and executor make of the requests, on one stage."""
    plan = engine_plan(1, num_pages=num_pages)
    stage = build_stage(model, plan, 0, SdpaAttention())
    executor = StageExecutor(
        stage, cache_of(stage), page_size=PAGE_SIZE, is_last=True, clock=ScriptedClock()
    )
    core = AwaitingCore(
        num_slots=1,
        max_sequences_per_slot=4,
        max_tokens_per_step=16,
        num_pages=plan.num_kv_pages,
        page_size=PAGE_SIZE,
        max_context_tokens=MAX_TOKENS,
        eos_token_ids=(EOS,),
        restart_tokens=read_spec(model.folder).rotary.restart_tokens,
    )
    table = SequenceTable()
    outcomes: dict[int, Outcome] = {}
    logprobs: dict[int, list[TokenLogprobs | None]] = {n: [] for n in range(len(requests))}
    for number, request in enumerate(requests):
        core.add(request)
        rotary_len = core.rotary_len(number)
        table.open(RequestOpened(number, request.prompt_ids, request.sampling, rotary_len))
    while not core.is_idle:
        step = core.next_step()
        assert step is not None
        for scheduled in step.sequences:
            if not scheduled.num_computed:
                _reopen(core, table, requests, scheduled.sequence_id)
        output = executor.run(
            PreparedStep(
                step, table.place(step), table.input_ids(step), table.sample_rows(step), ()
            ),
            None,
        )
        sampled_ids = output.tensor.tolist()
        table.append_sampled(step, sampled_ids)
        sampled = [s.sequence_id for s in step.sequences if s.sample]
        for sequence_id, entry in zip(sampled, output.logprobs or (), strict=False):
            logprobs[sequence_id].append(entry)
        for instruction in core.sampled(step.step, sampled_ids):
            if isinstance(instruction, Finished):
                number = instruction.sequence_id
                outcomes[number] = Outcome(
                    instruction.token_ids, instruction.reason, logprobs[number]
                )
    return [outcomes[number] for number in range(len(requests))]


def _reopen(
    core: AwaitingCore, table: SequenceTable, requests: Sequence[Request], number: int
) -> None:
    """As the runner tells of a sequence that starts over."""
    known, rotary_len = core.known_tokens(number), core.rotary_len(number)
    request, num_outputs = requests[number], len(known) - len(requests[number].prompt_ids)
    table.open(RequestOpened(number, known, request.sampling, rotary_len, num_outputs))


def make_requests(
    lengths: Sequence[int], sampling: Callable[[int], SamplingParams]
) -> list[Request]:
    """Prompts of the given lengths, each with settings of its own."""
    return [
        Request(
            f"r{number}",
            number,
            tuple(int(i) for i in np.random.default_rng(number).integers(3, 97, length)),
            sampling(number),
        )
        for number, length in enumerate(lengths)
    ]


def _unpin(device: torch.device, pinned: PinnedMemory) -> None:
    """When nothing copies from or to it any more."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    pinned.close()
