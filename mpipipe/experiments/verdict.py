"""What the records of an experiment say: a figure for each case, and words where the noise allows.

Pure: from the matrix and the records alone. Validity comes first: a case whose runs made different
tokens, or that has not all of its runs, gets no verdict on its speed.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from mpipipe.experiments.record import Case, Ceiling, Flag, Matrix, Outcome, Record
from mpipipe.experiments.statistics import Spread, paired_ratio, spread_of

__all__ = ["CaseVerdict", "ExperimentVerdict", "judge", "with_token_flags"]

# Doubling the batch must bring more than this, or it is not worth its latency and memory.
KNEE_GAIN = 1.10


@dataclass(frozen=True, slots=True)
class CaseVerdict:
    """One case over all of its repeats."""

    case: Case
    outcome: Outcome | None  # the worst of its runs; None: some have not run
    reason: str
    num_ok: int
    speed: Spread | None  # output tokens per second while generating
    speedup: Spread | None  # over the arm's smallest case, repeat by repeat
    efficiency: float | None  # speedup over the ratio of stages; in a batch experiment of batches
    ceiling_tokens_per_s: float | None
    ceiling_speedup: float | None
    joules_per_token: float | None
    flags: tuple[Flag, ...]  # of any of its runs
    same_tokens: bool  # all of its runs made the same

    @property
    def is_valid(self) -> bool:
        """Whether all of its runs succeeded with the same tokens."""
        return self.outcome == "ok" and self.same_tokens


@dataclass(frozen=True, slots=True)
class ExperimentVerdict:
    """All cases, and what they say together."""

    cases: tuple[CaseVerdict, ...]
    num_missing: int
    knee: int | None  # batch from which a doubling gains too little; None: none was shown
    largest_safe_batch: int | None  # all smaller ones have succeeded, too
    best: CaseVerdict | None  # of a batch experiment: at the knee, else the fastest safe one
    notes: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether every cell has a result and the tokens of each case agree."""
        return not self.num_missing and all(case.is_valid for case in self.cases)


def with_token_flags(records: Sequence[Record]) -> dict[str, tuple[Flag, ...]]:
    """The flags of each record by its name, "other tokens" added where it differs from most."""
    of_case: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        of_case[record.case.name].append(record)
    flags: dict[str, tuple[Flag, ...]] = {}
    for runs in of_case.values():
        hashes = Counter(run.tokens_hash for run in runs if run.tokens_hash is not None)
        usual = hashes.most_common(1)[0][0] if hashes else None
        for run in runs:
            differs = run.tokens_hash is not None and run.tokens_hash != usual
            flags[run.name] = (*run.flags, "other tokens") if differs else run.flags
    return flags


def judge(matrix: Matrix, records: Sequence[Record]) -> ExperimentVerdict:
    """What the records say so far."""
    judged = _Judge(matrix, _by_case(matrix, records), with_token_flags(records))
    cases = tuple(map(judged.case, matrix.cases))
    num_missing = len(matrix.order) - sum(map(len, judged.runs.values()))
    notes = tuple(judged.notes(cases))
    if matrix.experiment != "batch":
        return ExperimentVerdict(cases, num_missing, None, None, None, notes)
    knee, note = judged.knee(cases)
    safe = _largest_safe(cases)
    best = next((case for case in cases if case.case.batch == knee), None) or _fastest(cases)
    return ExperimentVerdict(cases, num_missing, knee, safe, best, (*notes, note))


def _by_case(matrix: Matrix, records: Sequence[Record]) -> dict[str, list[Record]]:
    of_case: dict[str, list[Record]] = {case.name: [] for case in matrix.cases}
    for record in records:
        if record.case.name in of_case:
            of_case[record.case.name].append(record)
    return of_case


_WORST: tuple[Outcome, ...] = ("failed", "timeout", "out_of_memory", "infeasible", "ok")


@dataclass(frozen=True, slots=True)
class _Judge:
    matrix: Matrix
    runs: Mapping[str, Sequence[Record]]  # by case
    flags: Mapping[str, tuple[Flag, ...]]  # by record

    def case(self, case: Case) -> CaseVerdict:
        """Everything that is said of one case."""
        runs, base = self.runs[case.name], self.base(case)
        worst = min((run.outcome for run in runs), key=_WORST.index, default=None)
        is_whole = len(runs) == self.matrix.repeat or worst != "ok"
        speeds, speedup = self.speeds(case), None
        if case != base:
            speedup = paired_ratio(speeds, self.speeds(base))
        ceiling, base_ceiling = self.ceiling(case), self.ceiling(base)
        ceiling_speedup = None
        if ceiling is not None and base_ceiling is not None and case != base:
            ceiling_speedup = ceiling.model_tokens_per_s / base_ceiling.model_tokens_per_s
        flags = tuple(dict.fromkeys(flag for run in runs for flag in self.flags[run.name]))
        growth = _growth(case, base)
        joules = [joules for run in runs if (joules := _joules_per_token(run)) is not None]
        return CaseVerdict(
            case=case,
            outcome=worst if is_whole else None,
            reason=next((run.reason for run in runs if run.outcome == worst), ""),
            num_ok=sum(run.outcome == "ok" for run in runs),
            speed=spread_of(list(speeds.values())),
            speedup=speedup,
            efficiency=None if speedup is None else speedup.median / growth,
            ceiling_tokens_per_s=None if ceiling is None else ceiling.tokens_per_s,
            ceiling_speedup=ceiling_speedup,
            joules_per_token=statistics.median(joules) if joules else None,
            flags=flags,
            same_tokens="other tokens" not in flags,
        )

    def base(self, case: Case) -> Case:
        """The smallest case of its arm."""
        cases = [other for other in self.matrix.cases if other.arm == case.arm]
        return min(cases, key=lambda other: (other.num_stages, other.num_nodes, other.batch or 0))

    def speeds(self, case: Case) -> dict[int, float]:
        """Tokens per second by repeat."""
        runs = self.runs[case.name]
        return {run.repeat: speed for run in runs if (speed := run.tokens_per_s) is not None}

    def ceiling(self, case: Case) -> Ceiling | None:
        """The same for all of its runs."""
        return next((run.ceiling for run in self.runs[case.name] if run.ceiling), None)

    def knee(self, cases: Sequence[CaseVerdict]) -> tuple[int | None, str]:
        """The batch from which a doubling gains less than 10 %, beyond the noise; and the words."""
        valid = [case for case in cases if case.is_valid]
        for small, large in pairwise(valid):
            gain = self._gain_per_doubling(small.case, large.case)
            if gain is not None and gain.is_below(KNEE_GAIN):
                return small.case.batch, (
                    f"The knee is at batch {small.case.batch}: another doubling gives "
                    f"{gain.median:.2f}× the throughput ({gain.low:.2f} to {gain.high:.2f}), less "
                    f"than {KNEE_GAIN:.2f}×."
                )
        if len(valid) < 2:
            return None, "No knee: fewer than two batches have valid runs."
        last = self._gain_per_doubling(valid[-2].case, valid[-1].case)
        if last is not None and last.is_above(KNEE_GAIN):
            return None, (
                f"No knee: the throughput still grows at batch {valid[-1].case.batch}, try larger "
                "ones."
            )
        return None, "No knee is shown beyond the noise: more repeats, or longer runs, would tell."

    def _gain_per_doubling(self, small: Case, large: Case) -> Spread | None:
        doublings = math.log2((large.batch or 1) / (small.batch or 1))
        speeds, base = self.speeds(large), self.speeds(small)
        return paired_ratio(
            {repeat: speed ** (1 / doublings) for repeat, speed in speeds.items()},
            {repeat: speed ** (1 / doublings) for repeat, speed in base.items()},
        )

    def notes(self, cases: Sequence[CaseVerdict]) -> Iterator[str]:
        """What a reader should know beside the figures, a sentence each."""
        for case in cases:
            yield from _case_notes(case)
            places = {run.num_places for run in self.runs[case.case.name]} - {None}
            if case.case.batch is None and any(
                places_of_run > case.case.num_prompts for places_of_run in places if places_of_run
            ):
                yield (
                    f"{case.case.name}: memory holds {max(filter(None, places))} prompts at once, "
                    f"and there are {case.case.num_prompts}: more prompts would fill it."
                )
        commits = {run.commit for runs in self.runs.values() for run in runs}
        if len(commits) > 1:
            known = ", ".join(sorted(commit[:10] for commit in commits if commit))
            yield f"The code was changed between the runs (commits {known}): compare with care."
        if self.matrix.experiment != "weak":
            hashes = {run.tokens_hash for runs in self.runs.values() for run in runs} - {None}
            if len(hashes) > 1 and all(case.same_tokens for case in cases):
                yield (
                    "The tokens of each case agree, but some cases made other tokens than others: "
                    "other batches round differently; in float32 this would be a fault."
                )


def _growth(case: Case, base: Case) -> float:
    """What perfect scaling would multiply the throughput by."""
    if case.arm == "batch":
        return (case.batch or 1) / (base.batch or 1)
    return case.num_stages / base.num_stages


def _case_notes(verdict: CaseVerdict) -> Iterator[str]:
    name, speedup = verdict.case.name, verdict.speedup
    if verdict.outcome not in {None, "ok"}:
        yield f"{name}: {verdict.outcome}: {verdict.reason}"
    elif not verdict.same_tokens:
        yield f"{name}: its runs made different tokens, so its speed means nothing."
    elif verdict.outcome == "ok" and speedup is not None:
        told = f"{speedup.median:.2f}× its smallest case ({speedup.low:.2f} to {speedup.high:.2f})"
        if not speedup.is_sound:
            repeats = "1 repeat is" if speedup.num == 1 else f"{speedup.num} repeats are"
            judged = f"no verdict: {repeats} too few for an interval of 90 %"
        elif speedup.low > 1:
            judged = "faster"
        elif speedup.high < 1:
            judged = "slower"
        else:
            judged = "no difference beyond the noise"
        of_ceiling = ""
        if verdict.ceiling_speedup:
            of_ceiling = f"; the cost model allows {verdict.ceiling_speedup:.2f}×"
        yield f"{name}: {told}: {judged}{of_ceiling}."


def _joules_per_token(run: Record) -> float | None:
    requests = (run.metrics or {}).get("requests") or {}
    num_tokens = requests.get("num_output_tokens") or 0
    return run.energy_j / num_tokens if run.energy_j is not None and num_tokens else None


def _largest_safe(cases: Sequence[CaseVerdict]) -> int | None:
    """The largest batch below the first one that did not succeed."""
    safe = [case.case.batch for case in takewhile(lambda case: case.outcome == "ok", cases)]
    return safe[-1] if safe else None


def _fastest(cases: Sequence[CaseVerdict]) -> CaseVerdict | None:
    valid = [case for case in cases if case.is_valid and case.speed is not None]
    return max(valid, key=lambda case: case.speed.median if case.speed else 0.0, default=None)
