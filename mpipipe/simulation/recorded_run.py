"""A run that was recorded, as a simulation takes it: its plan, its requests, what its steps took.

So the schedule alone is compared: the simulation decides and waits anew, with the run's own stage
times. Needs a run with `log.steps = "all"`; of one that kept the last steps only, their times stand
for all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING

from mpipipe.errors import OutputError
from mpipipe.logs.facts import read_facts
from mpipipe.logs.reading import number, rows, text, whole
from mpipipe.plain_values import from_plain
from mpipipe.planning.plan import PipelinePlan
from mpipipe.simulation.simulated_requests import RequestLengths
from mpipipe.simulation.stage_times import HeadTimes, StepWork

if TYPE_CHECKING:
    from mpipipe.logs.facts import RankFacts
    from mpipipe.logs.reading import Line, RunFiles

__all__ = ["Measured", "RecordedRun", "RecordedTimes", "read_recorded_run"]

_HELD = ("compute", "overhead", "send")
_MESSAGE_S = 50e-6  # MPI between processes of a host, where no step tells


@dataclass(frozen=True, slots=True)
class RecordedTimes:
    """`StageTimes` from the steps of a run.

    A step takes what the step of the same number took, as long as it has as many tokens: a stage is
    not always equally fast, and the others wait for each slow step. Any other step takes the mean
    of those of its phase and size, or what lies between two sizes.

    Attributes:
        seconds: of each stage, by number of the step: its tokens and how long it took.
        curves: of each stage, by phase: (tokens of a step, seconds), ascending.
        hop_s: from each stage but the last to the next.
        ids_s: from the last to the first.
    """

    seconds: Sequence[Mapping[int, tuple[int, float]]]
    curves: Sequence[Mapping[str, Sequence[tuple[int, float]]]]
    hop_s: tuple[float, ...]
    ids_s: float

    def compute_s(self, work: StepWork, step: int) -> tuple[float, ...]:
        """As `StageTimes`."""
        found = []
        for seconds, curves in zip(self.seconds, self.curves, strict=True):
            num_tokens, step_s = seconds.get(step, (0, 0.0))
            if num_tokens != work.num_tokens:
                step_s = _at(_curve(curves, work), work.num_tokens)
            found.append(step_s)
        return tuple(found)

    def hops_s(self, num_tokens: int) -> tuple[float, ...]:  # noqa: ARG002 - as they were
        """As `StageTimes`."""
        return self.hop_s


@dataclass(frozen=True, slots=True)
class Measured:
    """What the run itself took."""

    generate_s: float
    num_output_tokens: int
    bubble_ratios: tuple[float, ...]  # by stage: waiting for input, or without a step

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over the generate phase."""
        return self.num_output_tokens / self.generate_s if self.generate_s else 0.0


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """All that a simulation needs of a run, and what to compare it with."""

    plan: PipelinePlan
    requests: tuple[RequestLengths, ...]
    times: RecordedTimes
    head: HeadTimes
    measured: Measured
    notes: tuple[str, ...] = ()  # what it did that a simulation does not


def read_recorded_run(files: RunFiles) -> RecordedRun:
    """Read the run of `files`.

    Raises:
        OutputError: it does not say enough: no plan, no requests or no steps.
    """
    manifest, metrics = files.document("manifest.json"), files.document("metrics.json")
    try:
        plan = from_plain(PipelinePlan, manifest.get("plan"))
    except ValueError as error:
        raise _unusable(
            files, f"its manifest.json holds no plan of this version ({error})"
        ) from error
    if plan.num_replicas > 1:
        raise _unusable(files, "it had several replicas, and one pipeline is taken from a run")
    facts = read_facts(files)
    requests = _requests(files, facts.attempt, manifest)
    if not requests:
        raise _unusable(files, "no prompt of it was completed")
    steps = [
        [line for _, line in files.step_lines(stage.rank, facts.attempt)] for stage in plan.stages
    ]
    if not all(steps):
        raise _unusable(files, "it has no lines of steps (log.steps = none?)")
    by_rank = {rank.rank: rank for rank in facts.ranks}
    head_us = [number(row, "head_us_per_step") or 0.0 for row in rows(metrics, "ranks")]
    measured = Measured(
        generate_s=facts.generate_s,
        num_output_tokens=sum(request.num_output_tokens for request in requests),
        bubble_ratios=tuple([1 - _held_share(by_rank[stage.rank]) for stage in plan.stages]),
    )
    times = _times(steps)
    head = HeadTimes(
        step_s=max(head_us, default=0.0) * 1e-6, message_s=_MESSAGE_S, notice_s=_MESSAGE_S
    )
    return RecordedRun(plan, requests, times, head, measured, _notes(metrics))


def _notes(metrics: Line) -> tuple[str, ...]:
    """Its files have the lengths of its prompts, not their tokens."""
    drafts = metrics.get("drafts")
    spared = (
        (whole(metrics, "num_shared_tokens"), "prompt tokens in shared prefixes"),
        (whole(drafts if isinstance(drafts, dict) else {}, "num_accepted"), "drafted tokens"),
    )
    told = " and ".join([f"{count:,} {what}" for count, what in spared if count > 0])
    if not told:
        return ()
    return (f"the run was spared {told}, which the simulation computes: it takes longer for them",)


def _held_share(rank: RankFacts) -> float:
    """Of the generate phase, what steps held the stage, with all that goes with computing them."""
    held_s = sum(rank.parts_s.get(part, 0.0) for part in _HELD)
    return held_s / rank.generate_s if rank.generate_s else 0.0


def _unusable(files: RunFiles, why: str) -> OutputError:
    return OutputError(
        f"{files.folder} cannot be simulated: {why}; give a run that has ended, made with "
        "log.steps=all"
    )


def _requests(files: RunFiles, attempt: int, manifest: Line) -> tuple[RequestLengths, ...]:
    """The completed prompts in the order of the file."""
    generation = manifest.get("config", {}).get("generation", {})
    limit = whole(generation, "max_new_tokens", 1)
    found = []
    for line in files.lines("requests.jsonl", attempt):
        num_prompt_tokens, num_output_tokens = (
            whole(line, "num_prompt_tokens"),
            whole(line, "num_output_tokens"),
        )
        if not num_prompt_tokens or not num_output_tokens:
            continue  # an error record
        stopped = text(line, "finish_reason") == "stop"
        most = max(limit, num_output_tokens + 1) if stopped else num_output_tokens
        found.append(
            RequestLengths(whole(line, "index"), num_prompt_tokens, most, num_output_tokens)
        )
    return tuple(sorted(found, key=lambda request: request.index))


# ---- times ---------------------------------------------------------------------------------------


def _times(steps: Sequence[Sequence[Line]]) -> RecordedTimes:
    """What the stages, given by their lines, took."""
    hops_s = [_transfer_s(lines) for lines in steps]
    return RecordedTimes(
        seconds=[
            {whole(line, "step"): (whole(line, "num_tokens"), _held_s(line)) for line in lines}
            for lines in steps
        ],
        curves=[_curves(lines) for lines in steps],
        hop_s=tuple(hops_s[1:]),
        ids_s=hops_s[0] if len(steps) > 1 else 0.0,
    )


def _curves(lines: Iterable[Line]) -> dict[str, list[tuple[int, float]]]:
    """By phase: the mean time in which steps of so many tokens held the stage."""
    seconds: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        seconds[text(line, "phase")][whole(line, "num_tokens")].append(_held_s(line))
    return {
        phase: [(tokens, fmean(found)) for tokens, found in sorted(by_tokens.items())]
        for phase, by_tokens in seconds.items()
    }


def _held_s(line: Line) -> float:
    """How long the step held the stage."""
    return sum([number(line, f"{part}_s") or 0.0 for part in _HELD])


def _transfer_s(lines: Iterable[Line]) -> float:
    """What a hop takes: the median of those that nothing has hidden."""
    seen_s = [
        transfer_s
        for line in lines
        if (transfer_s := number(line, "transfer_s")) is not None
        and transfer_s > 0
        and (number(line, "wait_s") or 0.0) > 0
    ]
    return median(seen_s) if seen_s else _MESSAGE_S


def _curve(
    curves: Mapping[str, Sequence[tuple[int, float]]], work: StepWork
) -> Sequence[tuple[int, float]]:
    """That of the work's phase; of a phase that the run had not, the one that is most like it."""
    phase = "decode" if not work.chunk_tokens else "mixed" if work.rows else "prefill"
    alike = {"decode": "mixed", "mixed": "prefill", "prefill": "mixed"}[phase]
    return curves.get(phase) or curves.get(alike) or next(iter(curves.values()))


def _at(curve: Sequence[tuple[int, float]], tokens: int) -> float:
    """On the line between two known points; beyond the last one in proportion to the tokens."""
    position = bisect_left(curve, (tokens, 0.0))
    if position == len(curve):
        most, seconds = curve[-1]
        return seconds * tokens / most
    above, above_s = curve[position]
    if not position or above == tokens:
        return above_s
    below, below_s = curve[position - 1]
    return below_s + (above_s - below_s) * (tokens - below) / (above - below)
