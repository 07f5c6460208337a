"""Times the steps of a slice of a model, in the form in which a run would compute them.

A slice is loaded as a stage is (`runtime.loading`), prepared as a stage is (graphs captured where
the plan takes them), and driven by the same messages through `stage.engine`; no other rank and no
scheduler take part. The tokens mean nothing, the lengths are as asked for.
"""

from __future__ import annotations

import itertools
import time
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from mpipipe.bench.profile_points import MOST_DECODES, DecodeShape, PromptShape, Timed
from mpipipe.control_plane.messages import (
    DecodeScheduled,
    RequestOpened,
    ScheduledSequence,
    StepScheduled,
)
from mpipipe.data_plane.lanes import ALONE, joined_columns
from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.runtime.loading import StageParts, load_parts
from mpipipe.stage.assembly import open_engine, open_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mpipipe.clock import Clock
    from mpipipe.metrics.boot import BootTimeline
    from mpipipe.planning.plan import PipelinePlan, StagePlan
    from mpipipe.progress import ProgressEngine
    from mpipipe.stage.engine import StageEngine
    from mpipipe.stage.stream import Stream
    from mpipipe.types import SamplingParams

__all__ = ["SliceOpener", "StageTimer"]

_NUM_WARM_UP = 1
_LEAST_REPEATS = 2
_MOST_DECODE_REPEATS = 20  # each adds a token: see `MOST_DECODES`
_MOST_PROMPT_REPEATS = 50
_ENOUGH_S = 0.2  # of repeats of one point
_HOST_SHARE = 2.0  # of what the host needs: it varies
_LONGEST_HOLD_S = 0.5
_CYCLES_PER_S = 2e9  # of a GPU; of a slower one it is held longer
_NUM_IDS = 97  # that inputs vary over; any vocabulary has more


@dataclass(frozen=True, slots=True)
class SliceOpener:
    """What all slices of one measurement share."""

    plan: PipelinePlan  # its limits, forms and lanes; else its stages are not looked at
    device: torch.device
    clock: Clock
    progress: ProgressEngine
    boot: BootTimeline
    sampling: SamplingParams
    trust_remote_code: bool = False

    @contextmanager
    def opened(self, stage: StagePlan) -> Iterator[StageTimer]:
        """`stage`, loaded and ready; its memory is free again afterwards."""
        torch.set_num_threads(self.plan.threads_per_rank)
        began_s = time.perf_counter()
        parts = self._load(stage)
        loaded_s = time.perf_counter()
        _touch(parts)
        stream = open_stream(
            self.device,
            self.clock,
            self.progress,
            num_threads=self.plan.threads_per_rank,
            waits_on_host=parts.model.waits_on_host,
        )
        stream.enter()
        try:
            engine = open_engine(
                self.plan,
                parts.model,
                parts.kv_memory.cache,
                stream,
                attention_needs_seq_lens=parts.needs_seq_lens,
            )
            prepare_s = time.perf_counter()
            engine.prepare(self.plan.sampling)
            ready_s = time.perf_counter()
            yield StageTimer(
                engine,
                stream,
                plan=self.plan,
                takes_ids=stage.has_embedding,
                sampling=self.sampling,
                load_bytes_per_s=parts.weight_bytes / (loaded_s - began_s),
                prepare_s=ready_s - prepare_s,
            )
        finally:
            stream.close()
            parts.close()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _load(self, stage: StagePlan) -> StageParts:
        trust, num_lanes = self.trust_remote_code, self.plan.tensor_parallel
        lanes = ALONE if num_lanes == 1 else _FirstLane(num_lanes)
        return load_parts(self.plan, stage, trust, self.device, self.boot, lanes=lanes)


class _FirstLane:
    """One of several lanes, without the others: its tokens mean nothing, its own work is whole."""

    lane = 0

    def __init__(self, num_lanes: int) -> None:
        self.num_lanes = num_lanes

    def add_up(self, partial: torch.Tensor) -> torch.Tensor:
        return partial

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return joined_columns(part.expand(self.num_lanes, *part.shape))

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def _touch(parts: StageParts) -> None:
    """Have the cache in memory: pages that were never written are all the same one of zeros.

    Values vary, as in a run: a GPU that multiplies equal rows takes less power, and so less time
    (a step of 2,048 prompt tokens of Llama-3-8B on an H100 by a fifth).
    """
    cache = parts.kv_memory.cache
    if isinstance(cache, PagedKVCache):
        for tensor in (*cache.keys, *cache.values):
            tensor.normal_()


class StageTimer:
    """Times steps of one loaded slice.

    Args:
        engine: prepared.
        stream: entered by this thread.
        plan: of the engine.
        takes_ids: it has the embedding, and receives no hidden states.
        sampling: of all sequences.
        load_bytes_per_s: with which it was loaded.
        prepare_s: what making it ready took beside.
    """

    def __init__(
        self,
        engine: StageEngine,
        stream: Stream,
        *,
        plan: PipelinePlan,
        takes_ids: bool,
        sampling: SamplingParams,
        load_bytes_per_s: float,
        prepare_s: float,
    ) -> None:
        self.load_bytes_per_s = load_bytes_per_s
        self.prepare_s = prepare_s
        self._engine = engine
        self._stream = stream
        self._plan = plan
        self._takes_ids = takes_ids
        self._sampling = sampling
        self._step = 0
        self._varied_TH: torch.Tensor | None = None

    def timed(self, decodes: Iterable[DecodeShape], prompts: Iterable[PromptShape]) -> Timed:
        """The seconds of each of these steps; called in any thread."""
        torch.set_num_threads(self._plan.threads_per_rank)
        self._stream.enter()
        return Timed(
            {shape: self.decode_s(shape) for shape in decodes},
            {shape: self.prefill_s(shape) for shape in prompts},
        )

    def decode_s(self, shape: DecodeShape) -> float:
        """Seconds of a decode step."""
        rows, context_tokens = shape.rows, shape.context_tokens
        sequences = tuple(range(rows))
        pages = self._num_pages(context_tokens + MOST_DECODES)
        for sequence in sequences:
            self._open(sequence, context_tokens)
        self._engine.request_table.place(
            [
                ScheduledSequence(i, 0, context_tokens, self._pages(i, pages), sample=False)
                for i in sequences
            ],
            step=-1,
        )
        joining = itertools.chain((sequences,), itertools.repeat(()))

        def work() -> None:
            step = DecodeScheduled(self._next(), 0, rows, (), next(joining), (), (), steady=True)
            self._engine.decode(step, self._inputs(step))

        try:
            return self._seconds(work, _MOST_DECODE_REPEATS)
        finally:
            self._stream.drain()
            self._engine.clear()

    def prefill_s(self, shape: PromptShape) -> float:
        """Seconds of a step of prompt chunks, of which each samples a token."""
        end = shape.num_cached + shape.length
        pages = self._num_pages(end)
        table, chunks = self._engine.request_table, []
        for i in range(shape.num_sequences):
            self._open(i, end)
            new_pages = self._pages(i, pages)
            if shape.num_cached:
                table.place([ScheduledSequence(i, 0, end, new_pages, sample=False)], step=-1)
                new_pages = ()
            chunks.append(
                ScheduledSequence(i, shape.num_cached, shape.length, new_pages, sample=True)
            )

        def work() -> None:
            step = StepScheduled(self._next(), 0, tuple(chunks), steady=False)
            self._engine.prefill(step, self._inputs(step))

        try:
            return self._seconds(work, _MOST_PROMPT_REPEATS)
        finally:
            self._stream.drain()
            self._engine.clear()

    def _open(self, sequence: int, num_tokens: int) -> None:
        ids = tuple((sequence + place) % _NUM_IDS for place in range(num_tokens))
        self._engine.open(RequestOpened(sequence, ids, self._sampling, num_tokens))

    def _inputs(self, step: StepScheduled | DecodeScheduled) -> torch.Tensor | None:
        """Hidden states where the stage receives some: [T, hidden], varied (see `_touch`)."""
        if self._takes_ids:
            return None
        buffer_TH = self._engine.hidden_buffer(step)
        varied_TH = self._varied_TH
        if varied_TH is None or len(varied_TH) < len(buffer_TH):
            varied_TH = self._varied_TH = torch.randn_like(buffer_TH)
        return buffer_TH.copy_(varied_TH[: len(buffer_TH)])

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._plan.page_size_tokens)

    def _pages(self, sequence: int, num_pages: int) -> tuple[int, ...]:
        """Of its own, as long as there are enough."""
        first = sequence * num_pages
        return tuple(page % self._plan.num_kv_pages for page in range(first, first + num_pages))

    def _next(self) -> int:
        self._step += 1
        return self._step

    def _seconds(self, work: Callable[[], None], most_repeats: int) -> float:
        """Of one of many steps, behind each other, as the pipe has them."""
        for _ in range(_NUM_WARM_UP):
            once_s = self._once_s(work)
        repeats = int(max(_LEAST_REPEATS, min(most_repeats, _ENOUGH_S / max(once_s, 1e-9))))
        if self._stream.device.type != "cuda":
            return median(self._once_s(work) for _ in range(repeats))
        # As in a run, the host is ahead: it adds all of these while the device still waits.
        self._hold(_HOST_SHARE * repeats * self._launch_s(work))
        start = self._stream.record_event()
        for _ in range(repeats):
            work()
        end = self._stream.record_event()
        self._stream.drain()
        return start.seconds_until(end) / repeats

    def _launch_s(self, work: Callable[[], None]) -> float:
        """What the host needs to add one step."""
        began_s = time.perf_counter()
        work()
        launched_s = time.perf_counter() - began_s
        self._stream.drain()
        return launched_s

    def _hold(self, seconds: float) -> None:
        """Keep the GPU's stream busy for about so long; torch has no public name for it."""
        hold: Any = torch.cuda._sleep
        hold(int(min(seconds, _LONGEST_HOLD_S) * _CYCLES_PER_S))

    def _once_s(self, work: Callable[[], None]) -> float:
        began_s = time.perf_counter()
        work()
        self._stream.drain()
        return time.perf_counter() - began_s
