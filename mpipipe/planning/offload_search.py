"""How much a pipeline offloads: rows, tokens per step, split and placement of all stages. Pure.

More rows amortise what is brought to the devices, but their pages take the place of layers. So
candidates are tried: for so many rows, and so many tokens in a step of prompt chunks, each device
keeps the layers that fit beside the pages and the work space. Layers are dealt to the stages by
what a step of each then takes, its streaming included: a device with room gets more of them. The
candidate that completes the run's requests first wins; among equals the one that brings least, then
the one with fewer rows and shorter steps.

The cache of some layers may be in host memory, where kernels read it over the link: more rows fit,
and each step takes longer. That is chosen only where it completes the run clearly sooner.

`placement` places one stage, `memory` checks the result and gives what is left to the pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mpipipe.errors import PlanError
from mpipipe.planning.memory import gib
from mpipipe.planning.placement import (
    ModelParts,
    Placed,
    StageChoice,
    StageRoom,
    StageShape,
    StageSpeed,
    StepWork,
    forecast_step,
    least_device_bytes,
    place_stage,
    staging_bytes,
)

__all__ = [
    "PIN_BYTES_PER_S",
    "Candidate",
    "OffloadProblem",
    "RankRoom",
    "RunShape",
    "StageChoice",
    "best_candidate",
    "candidate_of",
    "check_staging",
    "with_disk",
]

# Of a run whose requests are not known: a mean context of 384 tokens, as in `cost`.
_PROMPT_TOKENS, _OUTPUT_TOKENS = 320, 128
# The cache in host memory: how much sooner it must complete the run, what kernels reach of the rate
# of copies (0.86 and 0.91 on an H100 over PCIe 5, steps of 128 and 256 rows), and the queries for
# which a prefill kernel reads what they see at once.
_LEAST_GAIN = 1.1
_READ_SHARE = 0.85
_QUERIES_PER_PASS = 64
PIN_BYTES_PER_S = 4e9  # of host memory: the system clears it first, for several threads at once


@dataclass(frozen=True, slots=True)
class RankRoom:
    """What one rank has for its stage."""

    device_bytes: int  # of the GPU, or this rank's share of the host's memory
    weight_limit_bytes: int | None  # that weights and buffers may take of it; None: all
    cache_factor: int  # how much must be free for a byte of cache
    host_bytes: int  # for offloaded weights
    has_disk: bool
    speed: StageSpeed
    pins_staging: bool = False  # see `StageRoom`
    kv_host_bytes: int = 0  # of host memory for the cache
    pool_bytes: int = 0  # of host memory for both; no more than that

    def for_weights(self, kv_bytes: int, work_bytes: int) -> int:
        """Beside so much cache and work space; may be negative."""
        left = self.device_bytes - work_bytes - self.cache_factor * kv_bytes
        return left if self.weight_limit_bytes is None else min(left, self.weight_limit_bytes)


@dataclass(frozen=True, slots=True)
class RunShape:
    """The requests of the run, or what is assumed of them."""

    num_requests: int | None  # None: more than fit
    num_prompt_tokens: float  # of one request, on average
    num_output_tokens: float
    longest_tokens: int
    is_longest_known: bool

    @staticmethod
    def of(
        num_requests: int | None,
        num_prompt_tokens: int | None,
        num_output_tokens: int | None,
        longest_tokens: int,
        *,
        is_longest_known: bool,
    ) -> RunShape:
        """From the totals of a run; None: not known."""
        if not num_requests or num_prompt_tokens is None or not num_output_tokens:
            output = min(_OUTPUT_TOKENS, max(1, longest_tokens // 2))
            prompt = min(_PROMPT_TOKENS, max(1, longest_tokens - output))
            return RunShape(num_requests, prompt, output, longest_tokens, is_longest_known)
        return RunShape(
            num_requests,
            num_prompt_tokens / num_requests,
            num_output_tokens / num_requests,
            longest_tokens,
            is_longest_known,
        )

    @property
    def context_tokens(self) -> float:
        """In the cache of a decoding sequence, on average."""
        return self.num_prompt_tokens + self.num_output_tokens / 2

    def num_pages(self, num_sequences: int, page_size: int) -> int:
        """For so many sequences at once; never fewer than the longest one needs, if it is known."""
        mean = -(-int(self.num_prompt_tokens + self.num_output_tokens) // page_size)
        longest = -(-self.longest_tokens // page_size) if self.is_longest_known else 1
        return max(num_sequences * max(1, mean) + -(-num_sequences // 2), longest)


@dataclass(frozen=True, slots=True)
class OffloadProblem:
    """All that the search knows."""

    model: ModelParts
    rooms: tuple[RankRoom, ...]  # in the order of the stages
    run: RunShape
    num_slots: int
    page_size: int
    # bytes of the cache of a stage: pages, layers → bytes
    kv_bytes: Callable[[int, int], int]
    # bytes of work space of a stage: rows, tokens, pages, layers, whether it has the head → bytes
    work_bytes: Callable[[int, int, int, int, bool], int]
    rows: tuple[int, ...]  # per slot, to try
    tokens: tuple[int, ...]  # per step, to try
    fixed_pages: int | None = None  # None: as many as the rows need
    fixed_split: tuple[int, ...] | None = None
    kv_host_shares: tuple[float, ...] = (0.0,)  # of the layers, whose cache is in host memory

    def pages_for(self, rows: int) -> int:
        """With `rows` sequences in each slot."""
        if self.fixed_pages is not None:
            return self.fixed_pages
        return self.run.num_pages(rows * self.num_slots, self.page_size)

    def least_device_bytes(self, stage: int, num_layers: int) -> int:
        """What its device must have for stage number `stage`, all offloaded that can be."""
        shape, room = self.shape(stage, num_layers), self.rooms[stage]
        least = least_device_bytes(shape, self.model.parts)
        if room.weight_limit_bytes is not None:
            return least
        rows, tokens = self.rows[0], self.tokens[0]
        pages = self.pages_for(rows)
        work_bytes = self.work_bytes(rows, tokens, pages, num_layers, shape.has_head)
        return least + work_bytes + room.cache_factor * self.kv_bytes(pages, num_layers)

    def shape(self, stage: int, num_layers: int) -> StageShape:
        """Stage number `stage` with so many layers."""
        return StageShape(
            num_layers, has_embedding=stage == 0, has_head=stage == len(self.rooms) - 1
        )


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run."""

    rows: int  # per slot
    tokens: int  # per step
    num_pages: int  # the least that the rows need
    stages: tuple[StageChoice, ...]
    tokens_per_s: float  # output tokens, predicted
    kv_host_share: float = 0.0  # of the layers, whose cache is in host memory
    # Predicted for the best with another share: none of it, or, where that is best, some; if tried.
    other_per_s: float | None = None

    @property
    def split(self) -> tuple[int, ...]:
        """Layers per stage."""
        return tuple(stage.placed.shape.num_layers for stage in self.stages)

    @property
    def is_resident(self) -> bool:
        """Nothing is offloaded."""
        return all(stage.placed.is_resident for stage in self.stages)

    @property
    def streamed_bytes(self) -> int:
        """Brought for one step of each stage."""
        return sum(
            stage.placed.streamed_host_bytes + stage.placed.streamed_disk_bytes
            for stage in self.stages
        )


def with_disk(problem: OffloadProblem) -> OffloadProblem:
    """The same, if every rank had a disk to offload to."""
    rooms = tuple(replace(room, has_disk=True) for room in problem.rooms)
    return replace(problem, rooms=rooms)


def check_staging(problem: OffloadProblem, candidate: Candidate) -> None:
    """Refuse a candidate whose ranks have no host memory for what comes from the disk.

    Raises:
        PlanError: says how much is missing.
    """
    staging = staging_bytes(problem.model.parts)
    for room, choice in zip(problem.rooms, candidate.stages, strict=True):
        is_used = room.pins_staging and choice.placed.streamed_disk_bytes > 0
        if is_used and room.host_bytes < staging:
            raise PlanError(
                f"a rank has {gib(room.host_bytes)} of host memory for offloaded weights, less "
                f"than the {gib(staging)} through which layers come from memory.offload_dir to a "
                "GPU, two pinned buffers of a layer each: raise memory.host_bytes to at least "
                f"{-(-staging * 101 // (100 << 20))} MiB, or free memory on its host"
            )


def best_candidate(problem: OffloadProblem) -> Candidate | None:
    """The candidate that completes the run first; None: none fits.

    With some of the cache in host memory only if it is the first by `_LEAST_GAIN`, and spares the
    run more than it takes to pin that memory.
    """
    on_devices = _first(problem, [0.0])
    least_rows = 1 if on_devices is None else on_devices.rows  # more rows are what it is for
    wider = replace(problem, rows=tuple(rows for rows in problem.rows if rows >= least_rows))
    in_part = _first(wider, [share for share in problem.kv_host_shares if share])
    if on_devices is None or in_part is None:
        return on_devices or in_part
    if _is_worth_pinning(problem, in_part, on_devices):
        return replace(in_part, other_per_s=on_devices.tokens_per_s)
    return replace(on_devices, other_per_s=in_part.tokens_per_s)


def _is_worth_pinning(problem: OffloadProblem, in_part: Candidate, on_devices: Candidate) -> bool:
    """Whether the cache of some layers goes to host memory. A run of unknown length is long."""
    if in_part.tokens_per_s < _LEAST_GAIN * on_devices.tokens_per_s:
        return False
    run = problem.run
    if run.num_requests is None:
        return True
    num_tokens = run.num_requests * run.num_output_tokens
    spared_s = num_tokens / on_devices.tokens_per_s - num_tokens / in_part.tokens_per_s
    pinned = max(
        problem.kv_bytes(in_part.num_pages, stage.num_kv_host_layers) for stage in in_part.stages
    )
    return spared_s > pinned / PIN_BYTES_PER_S


def _first(problem: OffloadProblem, shares: Sequence[float]) -> Candidate | None:
    found = [
        candidate
        for share in shares
        for tokens in problem.tokens
        for rows in problem.rows
        if rows <= tokens and (candidate := candidate_of(problem, rows, tokens, share)) is not None
    ]
    return max(
        found,
        key=lambda c: (_rounded(c.tokens_per_s), -c.streamed_bytes, -c.rows, -c.tokens),
        default=None,
    )


def _rounded(value: float) -> float:
    """Nine digits: sums of floats in another order are no reason for another plan."""
    return float(f"{value:.9g}")


def candidate_of(
    problem: OffloadProblem, rows: int, tokens: int, kv_host_share: float = 0.0
) -> Candidate | None:
    """With `rows` a slot and `tokens` a step; None: they do not fit."""
    num_pages = problem.pages_for(rows)
    choices = _Choices(problem, rows, tokens, num_pages, kv_host_share)
    split = problem.fixed_split or _deal(choices, problem.model.spec.num_layers, len(problem.rooms))
    if split is None:
        return None
    stages = [choices.stage(stage, num_layers) for stage, num_layers in enumerate(split)]
    chosen = tuple(stage for stage in stages if stage is not None)
    if len(chosen) < len(split):
        return None
    tokens_per_s = _tokens_per_s(problem, choices, chosen)
    return Candidate(rows, tokens, num_pages, chosen, tokens_per_s, kv_host_share)


def _first_alike(problem: OffloadProblem) -> tuple[int, ...]:
    """For each stage the first one with as much room and the same parts beside its layers."""
    kinds = [(room, problem.shape(stage, 1)) for stage, room in enumerate(problem.rooms)]
    first: dict[tuple[RankRoom, StageShape], int] = {}
    return tuple(first.setdefault(kind, stage) for stage, kind in enumerate(kinds))


class _Choices:
    """The stages of one candidate, stages that are alike placed once for each number of layers."""

    def __init__(
        self,
        problem: OffloadProblem,
        rows: int,
        tokens: int,
        num_pages: int,
        kv_host_share: float,
    ) -> None:
        self._problem = problem
        self._first_alike = _first_alike(problem)
        self._rows = rows
        self.tokens = tokens
        self._num_pages = num_pages
        self._kv_host_share = kv_host_share
        self._found: dict[tuple[int, int], StageChoice | None] = {}

    def stage(self, stage: int, num_layers: int) -> StageChoice | None:
        """Stage number `stage` with so many layers; None: they do not fit."""
        key = (self._first_alike[stage], num_layers)
        if key not in self._found:
            self._found[key] = self._place(stage, num_layers)
        return self._found[key]

    def _place(self, stage: int, num_layers: int) -> StageChoice | None:
        problem, room = self._problem, self._problem.rooms[stage]
        shape = problem.shape(stage, num_layers)
        work_bytes = problem.work_bytes(
            self._rows, self.tokens, self._num_pages, num_layers, shape.has_head
        )
        num_in_host = min(num_layers - 1, round(self._kv_host_share * num_layers))
        kv_bytes = problem.kv_bytes(self._num_pages, num_layers - num_in_host)
        kv_host_bytes = problem.kv_bytes(self._num_pages, num_in_host) if num_in_host else 0
        if kv_host_bytes > room.kv_host_bytes:
            return None
        host_bytes = room.host_bytes
        if num_in_host:
            host_bytes = min(host_bytes, max(0, room.pool_bytes - kv_host_bytes))
        stage_room = StageRoom(
            room.for_weights(kv_bytes, work_bytes), host_bytes, room.has_disk, room.pins_staging
        )
        work = StepWork(self._rows, problem.run.context_tokens)
        choice = place_stage(problem.model, shape, stage_room, work, room.speed)
        return choice if choice is None else self._reading(choice, num_in_host, room)

    def _reading(self, choice: StageChoice, num_in_host: int, room: RankRoom) -> StageChoice:
        """`choice` with the cache of so many layers read over the link."""
        tokens = self._rows * self._problem.run.context_tokens
        kv_bytes = int(tokens * self._token_bytes(num_in_host))
        kv_s = kv_bytes / (_READ_SHARE * room.speed.rates.host_bytes_per_s)
        forecast = replace(choice.forecast, kv_bytes=kv_bytes, kv_s=kv_s)
        return replace(choice, forecast=forecast, num_kv_host_layers=num_in_host)

    def _token_bytes(self, num_layers: int) -> float:
        """Of a token's keys and values in so many layers."""
        many = 1024
        whole = self._problem.kv_bytes(many, num_layers) - self._problem.kv_bytes(0, num_layers)
        return whole / (many * self._problem.page_size)

    def chunk_s(self, stage: int, placed: Placed, num_kv_host_layers: int = 0) -> float:
        """A step of prompt chunks."""
        mean_prompt = max(1.0, self._problem.run.num_prompt_tokens)
        ends = max(1, min(self.tokens, round(self.tokens / mean_prompt)))
        # A chunk reads keys and values once for all of its rows, so the traffic is that of `ends`.
        work = StepWork(self.tokens, 0.0, rows_to_head=ends)
        speed = self._problem.rooms[stage].speed
        computed_s = forecast_step(self._problem.model, placed, work, speed).step_s
        if not num_kv_host_layers:
            return computed_s
        passes = 1 + max(1.0, mean_prompt / 2 / _QUERIES_PER_PASS)  # one is to write
        read = self.tokens * self._token_bytes(num_kv_host_layers) * passes
        return computed_s + read / (_READ_SHARE * speed.rates.host_bytes_per_s)


def _deal(choices: _Choices, num_layers: int, num_stages: int) -> tuple[int, ...] | None:
    """Layers per stage so that the slowest stage is fastest; None: they do not fit.

    Every stage begins with the fewest layers that it can be placed with. The others are dealt one
    by one to the stage that takes least with one more. A step only gets longer with more layers, so
    no other way of dealing has a faster slowest stage. A stage that has time for one more, as it
    waits for its link, gets it before the others: so they stream less. Ties as in `partition`.
    """

    def step_s(stage: int, count: int) -> float:
        choice = choices.stage(stage, count)
        return float("inf") if choice is None else choice.forecast.step_s

    def least(stage: int) -> int:
        counts = range(1, num_layers + 1)
        return next((n for n in counts if choices.stage(stage, n) is not None), num_layers + 1)

    if num_stages == 1:
        return (num_layers,)
    split = [least(stage) for stage in range(num_stages)]
    if sum(split) > num_layers:
        return None

    def cost(stage: int) -> tuple[bool, float]:
        """Of one layer more."""
        longer_s = step_s(stage, split[stage] + 1)
        return longer_s > step_s(stage, split[stage]), longer_s

    order = [*range(1, num_stages - 1), num_stages - 1, 0]
    for _ in range(num_layers - sum(split)):
        taker = min(order, key=cost)
        if choices.stage(taker, split[taker] + 1) is None:
            return None  # no stage can take one more
        split[taker] += 1
    return tuple(split)


def _tokens_per_s(
    problem: OffloadProblem, choices: _Choices, stages: Sequence[StageChoice]
) -> float:
    """Output tokens per second over prefill and decode of the requests, wave by wave."""
    run, num_slots = problem.run, problem.num_slots
    at_once = stages[0].forecast.rows * num_slots
    sequences = float(at_once)
    if run.num_requests is not None:
        num_waves = -(-run.num_requests // at_once)
        sequences = run.num_requests / num_waves
    steps_s = [stage.forecast.step_s for stage in stages]
    round_s = max(sum(steps_s), num_slots * max(steps_s))
    chunks_s = [
        choices.chunk_s(number, stage.placed, stage.num_kv_host_layers)
        for number, stage in enumerate(stages)
    ]
    num_chunks = max(1.0, sequences * run.num_prompt_tokens / choices.tokens)
    prefill_s = sum(chunks_s) + (num_chunks - 1) * max(chunks_s)
    return sequences * run.num_output_tokens / (prefill_s + run.num_output_tokens * round_s)
