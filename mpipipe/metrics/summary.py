"""What a run did and where its time went: the contents of `metrics.json` and the closing text.

Built on the head from what each rank reports and from the completions. Pure: it measures nothing.

Shares and ratios are fractions of 1, `_s` seconds, `_bytes` bytes, `_per_s` per second of the
generate phase; null where nothing was measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpipipe.metrics.accounting import StageTotals
from mpipipe.metrics.attempts import DONE, AttemptState, AttemptTotals, total_of
from mpipipe.metrics.boot import PREPROCESSING, READING, BootPart, PartName
from mpipipe.metrics.drafts import DraftUse
from mpipipe.metrics.identity import SCHEMA
from mpipipe.metrics.offload import OffloadUse, PageMoveUse
from mpipipe.metrics.predicted import Compared, Prediction, compared, compared_fields
from mpipipe.metrics.replicas import ReplicaTotals
from mpipipe.metrics.spared import SparedWork

if TYPE_CHECKING:
    from mpipipe.metrics.identity import RunIdentity
    from mpipipe.types import Completion

__all__ = [
    "PhaseTimes",
    "RankReport",
    "RequestTally",
    "RequestTotals",
    "RunSummary",
    "percentile",
    "stage_figures",
]


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """The run's wall clock on the head, cut into its phases."""

    boot_s: float = 0.0  # start of the process to the agreed plan
    load_s: float = 0.0  # weights and cache on all ranks, the journal opened
    generate_s: float = 0.0  # to the last completion
    shutdown_s: float = 0.0  # files brought to the disk and merged, reports

    @property
    def wall_s(self) -> float:
        """The sum of the phases."""
        return self.boot_s + self.load_s + self.generate_s + self.shutdown_s


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank's share of the run, gathered by the head at the end."""

    rank: int
    host: str
    stage: StageTotals
    replica: int = 0
    load_s: float = 0.0  # of its own work, from `build` to `ready`; without waiting for others
    boot: tuple[BootPart, ...] = ()  # from the start of its process
    loaded_bytes: int = 0  # read from weight files
    weight_bytes: int = 0  # held as parameters
    kv_bytes: int = 0  # allocated for the KV cache on the device
    kv_host_bytes: int = 0  # for KV pages in host memory: of layers, or of preempted sequences
    baseline_rss_bytes: int = 0  # resident before loading: Python and its libraries
    peak_rss_bytes: int = 0
    gpu_peak_bytes: int = 0  # most that torch reserved on the GPU; 0 without one
    capture_s: float | None = None  # capturing CUDA graphs, a part of load_s; None without them
    cpu_us_per_step: float | None = None  # median, to launch a decode step; None: not measured
    head_us_per_step: float | None = None  # median, the head's scheduling; None elsewhere
    energy_j: float | None = None  # of its GPU while it generated; None: the card does not tell
    io_write_s: float = 0.0  # of the thread that wrote its lines about the run
    offload: OffloadUse | None = None  # None: all of its weights stand on the device
    page_moves: PageMoveUse | None = None  # None: no KV pages in host memory

    @property
    def boot_own_s(self) -> float:
        """Its boot without waiting for other ranks."""
        return sum(part.seconds for part in self.boot if part.name != "wait")

    def part_s(self, *names: PartName) -> float:
        """Seconds of the parts of its boot with these names."""
        return sum(part.seconds for part in self.boot if part.name in names)

    @property
    def used_bytes(self) -> int:
        """Most memory at once: of its GPU what torch held, on a CPU beside Python's libraries."""
        return self.gpu_peak_bytes or max(0, self.peak_rss_bytes - self.baseline_rss_bytes)

    @property
    def peak_over_need(self) -> float | None:
        """Peak above the baseline over weights + KV: 1 is perfect."""
        need = self.weight_bytes + self.kv_bytes
        return (self.peak_rss_bytes - self.baseline_rss_bytes) / need if need else None


@dataclass(frozen=True, slots=True)
class RequestTotals:
    """Counts over all prompts and percentiles over the completed ones."""

    num_completed: int
    num_failed: int
    num_prompt_tokens: int  # of completed prompts, as are the output tokens
    num_output_tokens: int
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    latency_p50_s: float | None
    latency_p95_s: float | None
    num_unfinished: int = 0  # the run was told to stop before them
    # Completed or failed in earlier attempts, counted nowhere else here: with the completed and
    # the failed ones of this attempt, as many as completions.jsonl has lines.
    num_kept: int = 0
    num_damaged: int = 0  # lines of earlier attempts that were set aside; their prompts ran again
    ttft_min_s: float | None = None  # from the start of generating to the run's first token


class RequestTally:
    """Counts completions as they come; keeps four numbers per completed prompt.

    `num_completed` and `num_failed` are the counts so far, for free.
    """

    def __init__(self) -> None:
        self.num_completed = 0
        self.num_failed = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._ttfts_s: list[float] = []
        self._latencies_s: list[float] = []
        self.lengths: list[tuple[int, int]] = []  # prompt and output tokens of completed prompts

    def add(self, completion: Completion) -> None:
        """Count one finished or failed prompt."""
        if completion.error_kind is not None:
            self.num_failed += 1
            return
        self.num_completed += 1
        self._num_prompt_tokens += completion.num_prompt_tokens
        self._num_output_tokens += completion.num_output_tokens
        self._ttfts_s.append(completion.ttft_s)
        self._latencies_s.append(completion.latency_s)
        self.lengths.append((completion.num_prompt_tokens, completion.num_output_tokens))

    def shared_ratio(self, num_shared_tokens: int) -> float:
        """Of the prompt tokens, this part."""
        num_tokens = self._num_prompt_tokens
        return min(1.0, num_shared_tokens / num_tokens) if num_tokens else 0.0

    def totals(self) -> RequestTotals:
        """The counts so far, with percentiles: sorts every time, so not while the run goes on."""
        return RequestTotals(
            num_completed=self.num_completed,
            num_failed=self.num_failed,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            ttft_p50_s=percentile(self._ttfts_s, 50),
            ttft_p95_s=percentile(self._ttfts_s, 95),
            latency_p50_s=percentile(self._latencies_s, 50),
            latency_p95_s=percentile(self._latencies_s, 95),
            ttft_min_s=min(self._ttfts_s, default=None),
        )


@dataclass(frozen=True, slots=True)
class RunSummary:
    """All figures of a run at its end."""

    phases: PhaseTimes
    requests: RequestTotals
    num_preemptions: int
    ranks: tuple[RankReport, ...]  # in the order of replicas and stages
    num_shared_tokens: int = 0  # of prompts, not computed: other prompts begin in the same way
    itl_p50_s: float | None = None  # between the tokens of a request, over all requests
    itl_p95_s: float | None = None
    identity: RunIdentity | None = None  # of the head
    state: AttemptState = DONE
    earlier: tuple[AttemptTotals, ...] = ()  # attempts before this one
    io_write_s: float = 0.0  # of the head's other thread that writes: completions, status, merging
    replicas: tuple[ReplicaTotals, ...] = ()  # empty where there is one
    drafts: DraftUse = field(default_factory=DraftUse)  # by n-gram lookup
    planned: Prediction | None = None  # before the run, with the longest outputs that are allowed
    predicted: Prediction | None = None  # for the tokens that were made; None: some prompts are not

    @property
    def compared(self) -> tuple[Compared, ...]:
        """Predicted beside measured, as far as both are known; empty without a prediction.

        Of each stage steps of one kind alone, and memory: these names end with its number.
        """
        predicted, phases = self.predicted, self.phases
        if predicted is None:
            return ()
        start_s, load_s = phases.boot_s + phases.load_s, max(rank.load_s for rank in self.ranks)
        return compared(
            ("tokens_per_s", predicted.tokens_per_s, self.output_tokens_per_s),
            ("wall_s", predicted.wall_s, phases.wall_s),
            ("generate_s", predicted.generate_s, phases.generate_s),
            ("start_s", predicted.start_s, start_s),
            ("load_s", predicted.load_s, load_s),
            *stage_figures(predicted, self.ranks),
        )

    @property
    def start_parts(self) -> dict[str, float]:
        """Where the head's time went from its start to the first token, in seconds: all of it.

        The parts of its boot in their order, then `run files` and `first step`. Empty where there
        was no token, or the head's boot is not known.
        """
        first_step_s = self.requests.ttft_min_s
        boot = self.ranks[0].boot if self.ranks else ()
        if first_step_s is None or not boot:
            return {}
        parts: dict[str, float] = {}
        for part in boot:
            parts[part.name] = parts.get(part.name, 0.0) + part.seconds
        before_s = self.phases.boot_s + self.phases.load_s
        rest_s = max(0.0, before_s - sum(parts.values()))
        return {**parts, "run files": rest_s, "first step": first_step_s}

    @property
    def attempts(self) -> tuple[AttemptTotals, ...]:
        """Those before, and this one."""
        own = AttemptTotals(
            attempt=len(self.earlier) + 1 if self.identity is None else self.identity.attempt,
            state=self.state,
            wall_s=self.phases.wall_s,
            generate_s=self.phases.generate_s,
            num_completed=self.requests.num_completed,
            num_failed=self.requests.num_failed,
            num_output_tokens=self.requests.num_output_tokens,
        )
        return (*self.earlier, own)

    @property
    def slowest_boot(self) -> RankReport | None:
        """The rank whose own work from its process's start to `ready` was longest."""
        booted = [rank for rank in self.ranks if rank.boot]
        return max(booted, key=lambda rank: rank.boot_own_s, default=None)

    @property
    def num_saved(self) -> int:
        """Of the preemptions, those whose pages went to host memory, of all replicas."""
        first = {
            rank.replica: rank.page_moves for rank in reversed(self.ranks) if not rank.stage.stage
        }
        return sum(moves.num_saved for moves in first.values() if moves is not None)

    @property
    def spared(self) -> SparedWork:
        """What was not computed."""
        return SparedWork.of_run(
            self.num_shared_tokens,
            self.drafts,
            num_output_tokens=self.requests.num_output_tokens,
            num_unfinished=self.requests.num_unfinished,
        )

    @property
    def energy_j(self) -> float | None:
        """Of all ranks; None where one does not tell. Ranks that share a GPU each count it."""
        told = [rank.energy_j for rank in self.ranks if rank.energy_j is not None]
        return sum(told) if told and len(told) == len(self.ranks) else None

    @property
    def bytes_moved(self) -> int:
        """Of tensors, from rank to rank."""
        return sum(rank.stage.bytes_out for rank in self.ranks)

    @property
    def output_tokens_per_s(self) -> float:
        """Generated tokens over the generate phase."""
        return self._per_s(self.requests.num_output_tokens)

    @property
    def total_tokens_per_s(self) -> float:
        """Prompt and generated tokens over the generate phase."""
        return self._per_s(self.requests.num_prompt_tokens + self.requests.num_output_tokens)

    @property
    def bubble_ratio(self) -> float | None:
        """Share of all stages' time that was not compute."""
        return _bubble(
            [rank.stage.overall.wall_s for rank in self.ranks],
            [rank.stage.overall.bubble_s for rank in self.ranks],
        )

    @property
    def steady_bubble_ratio(self) -> float | None:
        """The same between consecutive steady steps only: the pipe full, all slots decoding."""
        return _bubble(
            [rank.stage.steady.wall_s for rank in self.ranks],
            [rank.stage.steady.bubble_s for rank in self.ranks],
        )

    def to_dict(self) -> dict[str, Any]:
        """The contents of `metrics.json`.

        * `schema`, and the identity of the head's lines: `run`, `attempt`, `job`, `replica` …
        * `state`: `done`, or `stopped` before all prompts were
        * `phases`: `boot_s`, `load_s`, `generate_s`, `shutdown_s`, and their sum `wall_s`
        * `start`: seconds by part, from the head's start to the first token (`start_parts`)
        * `requests`: the fields of `RequestTotals`
        * `num_preemptions`; `num_saved`: those whose pages went to host memory, to come back
        * `drafts`: the fields of `DraftUse`: tokens drafted by n-gram lookup, and accepted
        * `num_shared_tokens`: prompt tokens that were not computed, as others begin with the same
        * `output_tokens_per_s`, `total_tokens_per_s`
        * `bubble_ratio`, `steady_bubble_ratio`: over all stages
        * `itl_p50_s`, `itl_p95_s`: seconds between the tokens of a request
        * `energy_j`, `bytes_moved`: of all ranks
        * `replicas`: where there are several, of each the fields of `ReplicaTotals` with
          `output_tokens_per_s` and `idle_ratio`, over the call of `generate`
        * `ranks`: one entry per stage, of each replica, with the fields of `RankReport` and
          `peak_over_need`; its `stage` has the fields of `StageTotals`, where `overall` and
          `steady` hold the seconds of each part (`compute_s`, `wait_s`, `transfer_s`, `send_s`,
          `idle_s`, `overhead_s`), their sum `wall_s`, `communication_s` (transfer and send) and
          the `bubble_ratio`
        * `planned`, `predicted`: the fields of `Prediction`; `compared`: by name the `predicted`
          and the `measured` value, and the `error`: (measured - predicted) / predicted
        * `time`: seconds by what they were for, see `_times`
        * `attempts`: of each start of the run the fields of `AttemptTotals`; `total`: their sums
        """
        return {
            "schema": SCHEMA,
            **(self.identity.fields() if self.identity is not None else {}),
            "state": self.state,
            "phases": {**dataclasses.asdict(self.phases), "wall_s": self.phases.wall_s},
            "start": self.start_parts,
            "requests": dataclasses.asdict(self.requests),
            "num_preemptions": self.num_preemptions,
            "num_saved": self.num_saved,
            "drafts": dataclasses.asdict(self.drafts),
            "num_shared_tokens": self.num_shared_tokens,
            "output_tokens_per_s": self.output_tokens_per_s,
            "total_tokens_per_s": self.total_tokens_per_s,
            "bubble_ratio": self.bubble_ratio,
            "steady_bubble_ratio": self.steady_bubble_ratio,
            "itl_p50_s": self.itl_p50_s,
            "itl_p95_s": self.itl_p95_s,
            "energy_j": self.energy_j,
            "bytes_moved": self.bytes_moved,
            "replicas": [replica.fields() for replica in self.replicas],
            "ranks": [_rank_dict(rank) for rank in self.ranks],
            "planned": None if self.planned is None else dataclasses.asdict(self.planned),
            "predicted": None if self.predicted is None else dataclasses.asdict(self.predicted),
            "compared": compared_fields(self.compared),
            "time": self._times(),
            "attempts": [dataclasses.asdict(attempt) for attempt in self.attempts],
            "total": total_of(self.attempts),
        }

    def added_to(self, finished: Mapping[str, Any] | None) -> dict[str, Any]:
        """`metrics.json` after an attempt that had nothing to do: `finished` with its attempts.

        `finished` is what the attempt that finished the run has told; None: all is of this one.
        """
        own = self.to_dict()
        return {**(finished or own), "attempts": own["attempts"], "total": own["total"]}

    def _times(self) -> dict[str, float]:
        """Ranks read, write and communicate side by side: the slowest counts.

        Prompts are read and tokenised, completions written, by the head alone.
        """
        head_s, others_s = self.io_write_s, 0.0
        if self.ranks:
            head_s += self.ranks[0].io_write_s
            others_s = max(rank.io_write_s for rank in self.ranks)
        return {
            "preprocessing_s": max((r.part_s(*PREPROCESSING) for r in self.ranks), default=0.0),
            "io_read_s": sum(
                max((r.part_s(part) for r in self.ranks), default=0.0) for part in READING
            ),
            "io_write_s": max(head_s, others_s),
            "communication_s": max(
                (rank.stage.overall.communication_s for rank in self.ranks), default=0.0
            ),
        }

    def _per_s(self, num_tokens: int) -> float:
        return num_tokens / self.phases.generate_s if self.phases.generate_s > 0 else 0.0


def stage_figures(
    predicted: Prediction, ranks: Sequence[RankReport]
) -> Iterator[tuple[str, float, float]]:
    """Name, predicted and measured value of what is known of both of each stage.

    Names end with the number of the stage; where there are several replicas, with theirs before it.
    """
    by_stage = {(rank.replica, rank.stage.stage): rank for rank in reversed(ranks)}
    several = len({stage.replica for stage in predicted.stages}) > 1
    for stage in predicted.stages:
        rank = by_stage.get((stage.replica, stage.stage))
        if rank is None:
            continue
        label = f"{stage.replica}.{stage.stage}" if several else str(stage.stage)
        yield f"decode_step_s_{label}", stage.decode_step_s, rank.stage.decode.mean_s
        yield f"prefill_step_s_{label}", stage.prefill_step_s, rank.stage.prefill.mean_s
        yield f"memory_bytes_{label}", stage.memory_bytes, rank.used_bytes


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The nearest-rank percentile: the smallest value that `percent` % of all do not exceed.

    None without values.
    """
    if not values:
        return None
    return sorted(values)[max(1, math.ceil(len(values) * percent / 100)) - 1]


def _bubble(walls_s: Sequence[float], bubbles_s: Sequence[float]) -> float | None:
    return sum(bubbles_s) / sum(walls_s) if sum(walls_s) > 0 else None


def _rank_dict(rank: RankReport) -> dict[str, Any]:
    values = dataclasses.asdict(rank)
    for name, parts in (("overall", rank.stage.overall), ("steady", rank.stage.steady)):
        values["stage"][name].update(
            wall_s=parts.wall_s,
            communication_s=parts.communication_s,
            bubble_ratio=parts.bubble_ratio,
        )
    values["boot"] = [part.fields() for part in rank.boot]
    return {**values, "peak_over_need": rank.peak_over_need}
