"""What a job will take under a plan: tokens per second, wall-clock, bubbles, energy. Pure.

The job is followed as the scheduler runs it, in strides of many rounds: sequences are admitted,
the longest outputs first, while places and pages last, their prompts pass the pipe, then all decode
until the next ones end. What runs out of pages gives up its youngest sequences, which are computed
anew, or whose pages are moved to host memory and back.

Simplifications: slots are equally full; a stage is busy while it computes and while tensors pass
its edges; outputs are as long as they may be. What prompts share is taken off all of them equally,
also from the pages that each needs.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.planning.padding import joined_tokens
from mpipipe.planning.plan import PipelinePlan, StagePlan
from mpipipe.planning.roofline import JobShape
from mpipipe.planning.startup import startup_by_rates
from mpipipe.planning.step_times import StepTimes

__all__ = ["JobForecast", "StageForecast", "forecast_job"]

# The scheduler's own choices (`scheduler.policy`): prompts interrupt decoding when an eighth of the
# running sequences can be admitted, and half a page is kept back for each of these.
_REFILL_PART = 8
_HEADROOM_PAGES = 0.5
# Longer jobs are followed in a sample of their sequences, and outputs of unlike lengths end in so
# many groups: the error is far below that of the step times.
_MOST_SEQUENCES = 4_096
_FEWEST_WAVES = 4  # that a sample fills all places with
_GROUPS_OF_ENDS = 64
# Draw of a GPU, as a share of its limit: measured on H100 between half idle and full pipes.
_IDLE_WATTS = 0.17
_BUSY_WATTS = 0.65


@dataclass(frozen=True, slots=True)
class StageForecast:
    """One stage over the whole job. Seconds; means over its steps."""

    stage: int
    rank: int
    prefill_step_s: float  # of a step of prompts
    decode_step_s: float
    prefill_busy_s: float  # computing and sending, of all of `JobForecast.prefill_s`
    decode_busy_s: float
    bubble: float  # share of the generating time in which it does neither
    replica: int = 0


@dataclass(frozen=True, slots=True)
class JobForecast:
    """What is expected of a job. `generating_s` is the time from the first step to the last."""

    tokens_per_s: float  # output tokens over `generating_s`
    generating_s: float
    startup_s: float  # before it: processes, imports, weights, kernels, graphs
    compile_s: float  # of `startup_s`: waiting for kernels that were not compiled before
    prefill_s: float  # of `generating_s`
    decode_s: float
    decode_round_s: float  # mean time of a token of every running sequence
    rows_per_slot: float  # mean, of decode steps
    num_rounds: float
    num_preemptions: int
    num_saved: int  # of these, to host memory; the others are computed anew
    num_kv_pages: int  # most that hold tokens at the same time
    bubble: float  # mean over the stages
    stages: tuple[StageForecast, ...]
    energy_j: float | None  # of the GPUs while generating; None: their power is not known
    source: str  # of the step times

    @property
    def wall_clock_s(self) -> float:
        """From the start of the processes to the last completion."""
        return self.startup_s + self.generating_s


def forecast_job(
    spec: ModelSpec,
    plan: PipelinePlan,
    shape: JobShape,
    times: StepTimes,
    *,
    watts: Mapping[int, float] | None = None,
) -> JobForecast:
    """What `shape` takes under `plan`.

    Args:
        spec: of the model.
        plan: whose stages `times` knows.
        shape: how much there is to do.
        times: of steps and hops.
        watts: the power limit of every rank's GPU, where known.
    """
    shape, lengths = shape.as_under(plan), shape.lengths
    most = max(_MOST_SEQUENCES, _FEWEST_WAVES * plan.num_slots * plan.max_sequences_per_slot)
    step = -(-len(lengths) // most)
    sample = sorted(lengths[::step], key=lambda pair: -pair[1])  # as they are admitted
    sequences = deque(itertools.starmap(_Sequence, sample))
    job = _Job(plan, times, sequences, sample[0][1] / _GROUPS_OF_ENDS, shape.shared_ratio)
    job.run()
    # A sample has its share of the work; what it does not have are full pipes at its end.
    scale = len(lengths) / len(sample)
    generating_s = (job.prefill_s + job.decode_s) * scale
    pairs = zip(plan.stages, job.busy, strict=True)
    stages = tuple(_stage_forecast(stage, job, busy, scale) for stage, busy in pairs)
    startup = startup_by_rates(spec, plan)
    return JobForecast(
        tokens_per_s=shape.num_output_tokens / generating_s,
        generating_s=generating_s,
        startup_s=startup.start_s,
        compile_s=startup.compile_s,
        prefill_s=job.prefill_s * scale,
        decode_s=job.decode_s * scale,
        decode_round_s=job.decode_s / job.rounds if job.rounds else 0.0,
        rows_per_slot=job.row_steps / job.slot_steps if job.slot_steps else 0.0,
        num_rounds=job.rounds * scale,
        num_preemptions=round(job.num_preemptions * scale),
        num_saved=round(job.num_saved * scale),
        num_kv_pages=min(plan.num_kv_pages, math.ceil(job.most_pages)),
        bubble=sum(stage.bubble for stage in stages) / len(stages),
        stages=stages,
        energy_j=_energy_j(stages, generating_s, watts or {}),
        source=times.source,
    )


def _stage_forecast(stage: StagePlan, job: _Job, busy: _Busy, scale: float) -> StageForecast:
    elapsed_s = job.prefill_s + job.decode_s
    return StageForecast(
        stage=stage.stage,
        rank=stage.rank,
        prefill_step_s=busy.prefill_step_s / max(1.0, job.num_prefill_steps),
        decode_step_s=busy.decode_step_s / max(1.0, job.slot_steps),
        prefill_busy_s=busy.prefill_s * scale,
        decode_busy_s=busy.decode_s * scale,
        bubble=max(0.0, 1 - (busy.prefill_s + busy.decode_s) / elapsed_s),
    )


def _energy_j(
    stages: tuple[StageForecast, ...], generating_s: float, watts: Mapping[int, float]
) -> float | None:
    if any(stage.rank not in watts for stage in stages):
        return None
    shares = ((watts[s.rank], _IDLE_WATTS + _BUSY_WATTS * (1 - s.bubble)) for s in stages)
    return generating_s * sum(limit * share for limit, share in shares)


# ---- the job -------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Sequence:
    """A prompt and its output, in tokens; `joined` is the round from which on it decodes."""

    prompt: int
    output: int
    made: int = 0  # before `joined`
    joined: float = 0.0
    number: int = -1  # of its admission; -1: it does not run
    moved_pages: int = 0  # in host memory, since it was preempted; 0: it is computed anew

    def known(self, rounds: float) -> float:
        """Tokens of prompt and output."""
        return self.prompt + self.made + rounds - self.joined


@dataclass(slots=True)
class _Busy:
    """Seconds of one stage: without, and with its edges."""

    prefill_step_s: float = 0.0
    decode_step_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(slots=True)
class _Job:
    """Follows a job. Public fields are totals over it."""

    plan: PipelinePlan
    times: StepTimes
    waiting: deque[_Sequence]
    grain: float  # rounds within which sequences count as ending together
    shared_ratio: float = 0.0  # of each prompt: neither computed nor kept
    running: dict[_Sequence, None] = field(default_factory=dict)  # by admission
    busy: list[_Busy] = field(default_factory=list)  # by stage
    rounds: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    row_steps: float = 0.0
    slot_steps: float = 0.0
    num_prefill_steps: float = 0.0
    num_preemptions: int = 0
    num_saved: int = 0
    most_pages: float = 0.0  # that hold tokens
    _ends: list[tuple[float, int, _Sequence]] = field(default_factory=list)  # heap by round
    _number: int = 0
    _num_known: float = 0.0  # tokens of all running sequences
    _num_shared: float = 0.0  # of these, those that others have computed
    _moved_pages: int = 0  # in host memory

    def run(self) -> None:
        """To the end of all sequences."""
        self.busy = [_Busy() for _ in self.plan.stages]
        while self.waiting or self.running:
            self._admit()
            self._decode()

    # ---- prompts ---------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Prompts go first where enough of them can be admitted."""
        admitted = self._admissible()
        threshold = min(len(self.waiting), max(1, len(self.running) // _REFILL_PART))
        if not admitted or (admitted < threshold and self.running):
            return
        newcomers = [self.waiting.popleft() for _ in range(admitted)]
        computed = [sequence for sequence in newcomers if not sequence.moved_pages]
        if computed:
            self._prefill(computed)
        for sequence in newcomers:
            if sequence.moved_pages:
                self._bring_back(sequence)
            else:
                sequence.made += 1
            sequence.joined = self.rounds
            left = sequence.output - sequence.made
            if left > 0:
                self.running[sequence] = None
                self._num_known += sequence.known(self.rounds)
                self._num_shared += self.shared_ratio * sequence.prompt
                sequence.number = self._number = self._number + 1
                heapq.heappush(self._ends, (self.rounds + left, sequence.number, sequence))

    def _admissible(self) -> int:
        """How many of those that wait have places and pages now; one where none runs."""
        plan = self.plan
        places = plan.num_slots * plan.max_sequences_per_slot - len(self.running)
        free = self._free_pages() - _HEADROOM_PAGES * len(self.running)
        admitted = 0
        for sequence in itertools.islice(self.waiting, places):
            own = sequence.prompt * (1 - self.shared_ratio) + sequence.made
            free -= -(-(own + 1) // plan.page_size_tokens)
            free -= _HEADROOM_PAGES
            if free < 0:
                break
            admitted += 1
        return admitted or (not self.running and bool(self.waiting))

    def _free_pages(self) -> float:
        """A sequence's last page is half full in the mean."""
        num_kept = self._num_known - self._num_shared
        used = num_kept / self.plan.page_size_tokens + len(self.running) / 2
        return self.plan.num_kv_pages - used

    def _prefill(self, newcomers: list[_Sequence]) -> None:
        """Steps of chunks of a slot each, one behind the other through the stages."""
        ends = [sequence.prompt + sequence.made for sequence in newcomers]
        # Each computes a token at least: the last one samples.
        tokens = [
            (min(sequence.prompt * self.shared_ratio, end - 1), end)
            for sequence, end in zip(newcomers, ends, strict=True)
        ]
        total = sum(end - start for start, end in tokens)
        pairs = sum((end * end - start * start) / 2 for start, end in tokens)
        num_slots = min(self.plan.num_slots, len(newcomers))
        num_steps = num_slots * -int(-total // (num_slots * self.plan.max_tokens_per_step))
        per_step = max(1, round(total / num_steps))
        steps_s = [
            self.times.prefill_s(stage, per_step, pairs / total) for stage in self.plan.stages
        ]
        hops_s = self._hops_s(per_step)
        taken_s = [step + _edges_s(hops_s, i) for i, step in enumerate(steps_s)]
        fill_s = sum(steps_s) + sum(hops_s)
        if (
            self.plan.lookahead == 0 and self.running
        ):  # decode steps are filled up: the pipe is full
            fill_s = max(taken_s)
        self.prefill_s += fill_s + (num_steps - 1) * max(taken_s)
        self.num_prefill_steps += num_steps
        for busy, step_s, stage_s in zip(self.busy, steps_s, taken_s, strict=True):
            busy.prefill_step_s += num_steps * step_s
            busy.prefill_s += num_steps * stage_s

    # ---- tokens ----------------------------------------------------------------------------------

    def _decode(self) -> None:
        """Rounds until the next sequences end, or the pages do."""
        self._preempt()
        num_running = len(self.running)
        if not num_running:
            return
        stride = max(self._next_end() - self.rounds, self.grain)
        most = self._free_pages() * self.plan.page_size_tokens / num_running
        stride = min(stride, max(1.0, most))
        self._run_rounds(stride, self._mean_context(stride))
        self._num_known += stride * num_running
        self.rounds += stride
        self.most_pages = max(self.most_pages, self.plan.num_kv_pages - self._free_pages())
        while self._ends and self._next_end() <= self.rounds + 1e-6:
            self._leave(heapq.heappop(self._ends)[2])

    def _mean_context(self, num_rounds: float) -> float:
        """Tokens that attention reads of a sequence in the mean of so many rounds."""
        num_running = len(self.running)
        if self.plan.attention != "sdpa" and not self.plan.read_prefixes_once:
            return self._num_known / num_running + num_rounds / 2
        ordered = sorted(self.running, key=lambda sequence: sequence.known(self.rounds))
        num_slots = min(self.plan.num_slots, num_running)
        slots = (ordered[slot::num_slots] for slot in range(num_slots))
        return sum(self._gathered(slot, num_rounds) for slot in slots) / num_running

    def _gathered(self, slot: Sequence[_Sequence], num_rounds: float) -> float:
        """Tokens that a step of `slot` reads in the mean of so many rounds.

        What its prompts share counts once for all of them, as if they all began alike, where steps
        read it once: on CPUs, and on GPUs if they are told to.
        """
        known = [sequence.known(self.rounds) + num_rounds / 2 for sequence in slot]
        reads_once = self.plan.device == "cpu" or self.plan.read_prefixes_once
        shared = [reads_once * self.shared_ratio * sequence.prompt for sequence in slot]
        return joined_tokens(known, shared, padded=self.plan.attention == "sdpa")

    def _next_end(self) -> float:
        """The round in which the next sequence ends; infinity: none runs."""
        while self._ends and self._ends[0][1] != self._ends[0][2].number:  # it was preempted
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else math.inf

    def _run_rounds(self, num_rounds: float, context: float) -> None:
        num_slots = min(self.plan.num_slots, len(self.running))
        rows = len(self.running) / num_slots
        steps_s = [self.times.decode_s(stage, rows, context) for stage in self.plan.stages]
        hops_s = self._hops_s(max(1, round(rows)))
        taken_s = [step + _edges_s(hops_s, i) for i, step in enumerate(steps_s)]
        return_s = hops_s[-1] if hops_s else 0.0  # ids from the last stage to the first
        round_s = max(sum(steps_s) + sum(hops_s) + return_s, num_slots * max(taken_s))
        self.decode_s += num_rounds * round_s
        self.row_steps += num_rounds * num_slots * rows
        self.slot_steps += num_rounds * num_slots
        for busy, step_s, stage_s in zip(self.busy, steps_s, taken_s, strict=True):
            busy.decode_step_s += num_rounds * num_slots * step_s
            busy.decode_s += num_rounds * num_slots * stage_s

    def _preempt(self) -> None:
        """The youngest wait again where there is no page for a token of each."""
        page_size = self.plan.page_size_tokens
        while len(self.running) > 1 and self._free_pages() < len(self.running) / page_size:
            sequence = next(reversed(self.running))
            self._leave(sequence)
            sequence.made += int(self.rounds - sequence.joined)
            self._move(sequence)
            self.waiting.appendleft(sequence)
            self.num_preemptions += 1

    def _move(self, sequence: _Sequence) -> None:
        """To host memory, where the plan says so and has room there."""
        num_tokens = sequence.prompt + sequence.made
        num_pages = -(-num_tokens // self.plan.page_size_tokens)
        is_worth_it = num_tokens >= self.plan.min_saved_tokens
        if is_worth_it and self._moved_pages + num_pages <= self.plan.num_host_pages:
            sequence.moved_pages = num_pages
            self.num_saved += 1
            self._moved_pages += num_pages

    def _bring_back(self, sequence: _Sequence) -> None:
        """With all that was computed."""
        self.decode_s += sequence.moved_pages * self.plan.moved_page_s
        self._moved_pages -= sequence.moved_pages
        sequence.moved_pages = 0

    def _leave(self, sequence: _Sequence) -> None:
        del self.running[sequence]
        self._num_known -= sequence.known(self.rounds)
        self._num_shared -= self.shared_ratio * sequence.prompt
        sequence.number = -1

    # ---- edges -----------------------------------------------------------------------------------

    def _hops_s(self, rows: int) -> list[float]:
        """Of every edge, in the order of the stages."""
        return [
            self.times.hop_s(rows, sender.host != receiver.host)
            for sender, receiver in itertools.pairwise(self.plan.stages)
        ]


def _edges_s(hops_s: list[float], stage: int) -> float:
    """Of the edges into and out of a stage."""
    return sum(hops_s[max(0, stage - 1) : stage + 1])
