"""What the records of an experiment say: a figure for each case, and words where the noise allows.

Pure: from the matrix and the records alone. Validity comes first: a case whose runs made different
tokens, or that has not all of its runs, gets no verdict on its speed, nor does a case that would be
compared with such a one.
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
    base: str | None  # name of the arm's smallest case; None: this is the one
    outcome: Outcome | None  # the worst of its runs; None: some have not run
    reason: str
    num_ok: int
    speed: Spread | None  # output tokens per second while generating
    speedup: Spread | None  # over `base`, repeat by repeat; means nothing unless comparable
    efficiency: float | None  # speedup over the ratio of ranks; in a batch experiment of batches
    ceiling_tokens_per_s: float | None
    ceiling_speedup: float | None
    joules_per_token: float | None
    flags: tuple[Flag, ...]  # of any of its runs
    same_tokens: bool  # all of its runs made the same
    is_comparable: bool  # all runs of it and of `base` are there, each with its case's tokens

    @property
    def is_valid(self) -> bool:
        """Whether all of its runs succeeded with the same tokens."""
        return self.outcome == "ok" and self.same_tokens


@dataclass(frozen=True, slots=True)
class ExperimentVerdict:
    """All cases, and what they say together."""

    cases: tuple[CaseVerdict, ...]
    num_missing: int
    knee: int | None  # batch after which no doubling gains enough; None: none was shown
    largest_safe_batch: int | None  # all smaller ones have succeeded, too
    # Of a batch experiment: at the knee, else the fastest safe one; of arrangements the fastest.
    best: CaseVerdict | None
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
    if matrix.experiment == "arrangements":
        best = _fastest(cases)
        notes = (*notes, *_best_arrangement(best, num_missing))
        return ExperimentVerdict(cases, num_missing, None, None, best, notes)
    if matrix.experiment != "batch":
        return ExperimentVerdict(cases, num_missing, None, None, None, notes)
    knee, note = judged.knee(cases)
    safe = _safe(cases)
    best = next((case for case in safe if case.case.batch == knee), None) or _fastest(safe)
    largest = safe[-1].case.batch if safe else None
    return ExperimentVerdict(cases, num_missing, knee, largest, best, (*notes, note))


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
        outcome, same_tokens = self.outcome(case), self.has_same_tokens(case)
        is_comparable = self.is_valid(case) and self.is_valid(base)
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
            base=None if case == base else base.name,
            outcome=outcome,
            reason=next((run.reason for run in runs if run.outcome == outcome), ""),
            num_ok=sum(run.outcome == "ok" for run in runs),
            speed=spread_of(list(speeds.values())),
            speedup=speedup,
            efficiency=None if speedup is None else speedup.median / growth,
            ceiling_tokens_per_s=None if ceiling is None else ceiling.tokens_per_s,
            ceiling_speedup=ceiling_speedup,
            joules_per_token=statistics.median(joules) if joules else None,
            flags=flags,
            same_tokens=same_tokens,
            is_comparable=is_comparable,
        )

    def outcome(self, case: Case) -> Outcome | None:
        """The worst of its runs; None: some have not run, and none has failed."""
        runs = self.runs[case.name]
        worst = min((run.outcome for run in runs), key=_WORST.index, default=None)
        return worst if worst != "ok" or len(runs) == self.matrix.repeat else None

    def has_same_tokens(self, case: Case) -> bool:
        """Whether all of its runs made the same, as far as they have run."""
        return not any("other tokens" in self.flags[run.name] for run in self.runs[case.name])

    def is_valid(self, case: Case) -> bool:
        """Whether its speed means something, by itself."""
        return self.outcome(case) == "ok" and self.has_same_tokens(case)

    def base(self, case: Case) -> Case:
        """The smallest case of its arm; of arrangements the one pipeline without lanes."""
        cases = [other for other in self.matrix.cases if other.arm == case.arm]
        if case.arm == "arrangements":
            return min(cases, key=lambda other: (other.num_replicas, other.num_lanes))
        return min(cases, key=lambda other: (other.num_stages, other.num_nodes, other.batch or 0))

    def speeds(self, case: Case) -> dict[int, float]:
        """Tokens per second by repeat."""
        runs = self.runs[case.name]
        return {run.repeat: speed for run in runs if (speed := run.tokens_per_s) is not None}

    def ceiling(self, case: Case) -> Ceiling | None:
        """The same for all of its runs."""
        return next((run.ceiling for run in self.runs[case.name] if run.ceiling), None)

    def knee(self, cases: Sequence[CaseVerdict]) -> tuple[int | None, str]:
        """The batch after which every doubling gains less than 10 %, beyond the noise; and words.

        Up to the largest safe batch, from each batch of the sweep to the next: a batch without
        valid runs hides both of its gains.
        """
        if any(case.outcome is None for case in cases):
            return None, "No knee yet: some batches have not all of their runs."
        safe = _safe(cases)
        if sum(case.is_valid for case in safe) < 2:
            return None, "No knee: fewer than two safe batches have valid runs."
        gains = [self._gain(small, large) for small, large in pairwise(safe)]
        flat = [*takewhile(lambda gain: gain and gain.is_below(KNEE_GAIN), reversed(gains))]
        if flat and (gain := flat[-1]) is not None:
            knee = safe[len(gains) - len(flat)].case.batch
            return knee, (
                f"The knee is at batch {knee}: another doubling gives {gain.median:.2f}× the "
                f"throughput ({gain.low:.2f} to {gain.high:.2f}), less than {KNEE_GAIN:.2f}×."
            )
        if gains[-1] is not None and gains[-1].is_above(KNEE_GAIN):
            is_limit = len(safe) < len(cases)
            advice = "the largest that is safe" if is_limit else "try larger ones"
            return None, (
                f"No knee: the throughput still grows at batch {safe[-1].case.batch}, {advice}."
            )
        return None, "No knee is shown beyond the noise: more repeats, or longer runs, would tell."

    def _gain(self, small: CaseVerdict, large: CaseVerdict) -> Spread | None:
        is_known = small.is_valid and large.is_valid
        return self._gain_per_doubling(small.case, large.case) if is_known else None

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
    return case.num_ranks / base.num_ranks


def _case_notes(verdict: CaseVerdict) -> Iterator[str]:
    name, speedup = verdict.case.name, verdict.speedup
    if verdict.outcome not in {None, "ok"}:
        yield f"{name}: {verdict.outcome}: {verdict.reason}"
    elif not verdict.same_tokens:
        yield f"{name}: its runs made different tokens, so its speed means nothing."
    elif verdict.outcome == "ok" and not verdict.is_comparable:
        yield (
            f"{name}: no verdict: {verdict.base}, which it is compared with, has not all of its "
            "runs, or they made different tokens."
        )
    elif verdict.outcome == "ok" and speedup is not None:
        base = "its smallest case" if verdict.case.arm != "arrangements" else verdict.base
        told = f"{speedup.median:.2f}× {base} ({speedup.low:.2f} to {speedup.high:.2f})"
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


def _best_arrangement(best: CaseVerdict | None, num_missing: int) -> Iterator[str]:
    """Only where nothing is missing: what has not run might be faster."""
    if best is None or best.speed is None or num_missing:
        return
    case = best.case
    yield (
        f"{case.name} (replicas × stages × lanes: {case.arrangement}) had the highest throughput: "
        f"{best.speed.median:,.1f} tokens/s."
    )


def _joules_per_token(run: Record) -> float | None:
    requests = (run.metrics or {}).get("requests") or {}
    num_tokens = requests.get("num_output_tokens") or 0
    return run.energy_j / num_tokens if run.energy_j is not None and num_tokens else None


def _safe(cases: Sequence[CaseVerdict]) -> list[CaseVerdict]:
    """The batches below the first one that did not succeed."""
    return list(takewhile(lambda case: case.outcome == "ok", cases))


def _fastest(cases: Sequence[CaseVerdict]) -> CaseVerdict | None:
    valid = [case for case in cases if case.is_valid and case.speed is not None]
    return max(valid, key=lambda case: case.speed.median if case.speed else 0.0, default=None)
