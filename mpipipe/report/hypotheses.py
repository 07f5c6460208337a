"""What was supposed before anything was measured, and whether the measurements agree.

The values are those of the student report that this project began with: its system never ran, and
its tables were supposed. They are kept here, and only here, so that measured values can stand
beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpipipe.report.numbers import count, measured

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.experiments.record import ExperimentName
    from mpipipe.experiments.statistics import Spread
    from mpipipe.report.rows import Row

__all__ = ["HYPOTHESES", "SOURCE", "Hypothesis", "compare", "hypothesis_for", "verdict"]

SOURCE = "the student report that this project began with, whose tables were supposed"


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What one case was supposed to reach over the case of size 1 of its arm."""

    experiment: ExperimentName
    size: int  # stages, one per node; in a batch sweep prompts in flight
    speedup: float | None
    efficiency: float


HYPOTHESES = (
    Hypothesis("strong", 2, 1.3, 0.65),
    Hypothesis("weak", 2, None, 0.90),
    Hypothesis("batch", 2, None, 0.90),
    Hypothesis("batch", 4, None, 0.80),
    Hypothesis("batch", 8, None, 0.43),
)

_SIZE_WORDS = {"strong": "{} nodes", "weak": "{} nodes", "batch": "a batch of {}"}
_MEANING = {
    "strong": "parallel efficiency",
    "weak": "weak-scaling efficiency",
    "batch": "batch efficiency",
}


def hypothesis_for(experiment: str, size: int) -> Hypothesis | None:
    """What was supposed of the case of this size, if anything was."""
    found = (h for h in HYPOTHESES if h.experiment == experiment and h.size == size)
    return next(found, None)


def compare(found: Spread | None, supposed: float) -> str:
    """Whether a measurement agrees with a value, in words; never a verdict inside the noise."""
    if found is None:
        return f"was not measured ({supposed:g} supposed)"
    if found.is_above(supposed):
        return f"{measured(found)}, above the {supposed:g} supposed"
    if found.is_below(supposed):
        return f"{measured(found)}, below the {supposed:g} supposed"
    if not found.is_sound:
        return f"{measured(found)}, from too few runs for a verdict on the {supposed:g} supposed"
    return f"{measured(found)}, which cannot be told apart from the {supposed:g} supposed"


def verdict(experiment: ExperimentName, arm: Sequence[Row]) -> str:
    """One paragraph on what was supposed of this experiment, for one of its arms."""
    supposed = [h for h in HYPOTHESES if h.experiment == experiment]
    if not supposed:
        return "Nothing."
    sentences = [_sentence(hypothesis, arm) for hypothesis in supposed]
    return " ".join([*sentences, *_cautions(supposed, arm)])


def _sentence(hypothesis: Hypothesis, arm: Sequence[Row]) -> str:
    place = _SIZE_WORDS[hypothesis.experiment].format(hypothesis.size)
    meaning = _MEANING[hypothesis.experiment]
    rows = [row for row in arm if row.size == hypothesis.size]
    # One node for each stage was supposed; a sweep may also have such a case on fewer.
    row = max(rows, key=lambda row: row.case.num_nodes == hypothesis.size, default=None)
    if row is None:
        return f"For {place}, {hypothesis.efficiency:g} of {meaning} was supposed; not measured."
    if row.throughput is None:
        reason = row.failures[0].reason if row.failures else "no run"
        return f"For {place}, the case {row.case.name} came to no result: {reason.rstrip('.')}."
    if row.base_size != 1 or row.speedup is None:
        return f"For {place} there is no result of size 1 to compare with, so there is no verdict."
    if not row.same_tokens:
        return f"For {place} the runs made different tokens, so there is no verdict."
    if not row.is_comparable:
        return (
            f"For {place} not all runs of {row.case.name} and {row.base} came to a result with the "
            "same tokens, so there is no verdict."
        )
    parts = []
    if hypothesis.speedup is not None:
        parts.append(f"speedup {compare(row.speedup, hypothesis.speedup)}")
    parts.append(f"{meaning} {compare(row.efficiency, hypothesis.efficiency)}")
    return f"For {place}: {'; '.join(parts)}."


def _cautions(supposed: Sequence[Hypothesis], arm: Sequence[Row]) -> list[str]:
    """What weakens the comparison."""
    sizes = {1, *(hypothesis.size for hypothesis in supposed)}
    rows = [row for row in arm if row.size in sizes]
    cautions = []
    if supposed[0].experiment != "batch":
        on_one = [
            row for row in rows if row.done and row.case.num_stages > 1 and row.case.num_nodes == 1
        ]
        if on_one:
            cautions.append(
                "Nodes were supposed, and here the stages shared one node, so that no network "
                "lay between them."
            )
    flagged: dict[str, int] = {}
    for row in rows:
        for flag, num in row.flags.items():
            flagged[flag] = flagged.get(flag, 0) + num
    if flagged:
        runs = sum(len(row.runs) for row in rows)
        words = ", ".join(f"{flag} ({num})" for flag, num in flagged.items())
        cautions.append(f"Of the {count(runs, 'run')} behind it some are flagged: {words}.")
    return cautions
