"""Rows as tables: the columns of the student report, then what it did not ask for; also as CSV.

Pure.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from typing import TYPE_CHECKING, Any

from mpipipe.report.document import Cell, Table
from mpipipe.report.figures import (
    BUBBLE,
    COMMUNICATION,
    CPU,
    ENERGY,
    FIGURES,
    GENERATE,
    GPU,
    IO,
    ITL_P50,
    ITL_P95,
    MEMORY,
    PREPROCESSING,
    THROUGHPUT,
    TTFT,
    WALL_CLOCK,
)
from mpipipe.report.hypotheses import SOURCE, hypothesis_for
from mpipipe.report.numbers import NOTHING, count, interval, number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.experiments.record import ExperimentName
    from mpipipe.experiments.statistics import Spread
    from mpipipe.report.figures import Figure
    from mpipipe.report.rows import Row

__all__ = ["csv_text", "further_table", "main_table", "meanings_table", "plain_row"]

# The order of the student report; nodes, prompts and batch size come before, efficiency after the
# second.
_MAIN: tuple[Figure, ...] = (GPU, CPU, IO, COMMUNICATION, PREPROCESSING)
_FURTHER: tuple[Figure, ...] = (GENERATE, BUBBLE, TTFT, ITL_P50, ITL_P95, MEMORY, ENERGY)
_EFFICIENCY = {
    "strong": "Parallel efficiency",
    "weak": "Parallel efficiency",
    "batch": "Batch efficiency",
    "arrangements": "Parallel efficiency",
}
_STAGES = "Parallel efficiency: speedup over how many times as many ranks there are."
_MEANINGS = {
    "strong": f"Speedup: throughput over that of {{base}}, repeat by repeat. {_STAGES}",
    "weak": (
        "The work grows with the stages. Speedup: throughput over that of {base}, repeat by "
        f"repeat. {_STAGES}"
    ),
    "batch": (
        "Speedup: throughput over that of {base}, repeat by repeat. Batch efficiency: speedup over "
        "how many times as large the batch is; 1 means that a larger batch costs no time."
    ),
    "arrangements": f"Speedup: throughput over that of {{base}}, repeat by repeat. {_STAGES}",
}
_OUTCOMES = {
    "out_of_memory": "out of memory",
    "timeout": "time limit",
    "infeasible": "cannot be planned",
    "failed": "failed",
}


def main_table(experiment: ExperimentName, rows: Sequence[Row], *, hypotheses: bool) -> Table:
    """The columns of the student report, and what is wrong with a row."""
    header = (
        "Case", "Nodes", "Prompts", "Batch size", "Speedup", WALL_CLOCK.title, THROUGHPUT.title,
        _EFFICIENCY[experiment], *(figure.title for figure in _MAIN),
    )  # fmt: skip
    bases = sorted({row.base for row in rows})
    notes = [_MEANINGS[experiment].format(base=" or ".join(bases))]
    if hypotheses:
        notes.append(f"Supposed: by {SOURCE}.")
    return Table(
        "Measured, and supposed" if hypotheses else "Measured",
        header,
        tuple(_main_row(experiment, row, hypotheses=hypotheses) for row in rows),
        tuple(notes),
        tuple(map(_fault_of, rows)),
    )


def further_table(rows: Sequence[Row]) -> Table:
    """What the student report did not ask for."""
    return Table(
        "More of the same runs",
        ("Case", *(figure.title for figure in _FURTHER), "CV (%)", "n"),
        tuple(_further_row(row) for row in rows),
    )


def meanings_table() -> Table:
    """What each column means."""
    shown = (WALL_CLOCK, THROUGHPUT, *_MAIN, *_FURTHER)
    rows = [
        *((figure.title, figure.meaning) for figure in shown),
        ("CV (%)", "standard deviation of the throughput over its mean"),
        ("n", "runs with a result, of all that were started"),
        (
            "Interval",
            (
                "below a median: the narrowest pair of order statistics that holds the true "
                "median with 90 %; of five runs it is their whole range (94 %), of fewer the range "
                "holds it less often, and no verdict is drawn from it"
            ),
        ),
    ]
    return Table("What the columns mean", ("Column", "Meaning"), tuple(map(_both_words, rows)))


def _fault_of(row: Row) -> str:
    """What failed and why, and what the runs with a result are flagged with; empty: nothing."""
    runs = len(row.runs)
    faults = [
        f"{_OUTCOMES[failure.outcome]} ({failure.num_runs} of {runs} runs): {failure.reason}"
        for failure in row.failures
    ]
    faults += [f"{flag} ({num} of {runs} runs)" for flag, num in row.flags.items()]
    if runs < row.num_planned:
        faults.append(f"{runs} of {row.num_planned} runs were made")
    if row.done and not faults and not row.is_comparable:  # so its base is at fault
        faults.append(f"no verdict on the speedup over {row.base}")
    return "; ".join(faults)


def _main_row(experiment: ExperimentName, row: Row, *, hypotheses: bool) -> tuple[Cell, ...]:
    # Supposed was what a case reaches over the one of size 1, over no other.
    is_compared = hypotheses and row.base_size == 1 and row.is_comparable
    supposed = hypothesis_for(experiment, row.size) if is_compared else None
    return (
        _words(row.case.name),
        Cell(str(row.case.num_nodes), _stages(row)),
        Cell(f"{row.case.num_prompts:,}"),
        _batch(row),
        _spread(row.speedup, supposed.speedup if supposed else None),
        _spread(row.figures[WALL_CLOCK.key]),
        _spread(row.throughput),
        _spread(row.efficiency, supposed.efficiency if supposed else None),
        *(_spread(row.figures[figure.key]) for figure in _MAIN),
    )


def _further_row(row: Row) -> tuple[Cell, ...]:
    throughput = row.throughput
    cv = throughput.cv if throughput else None
    done, started = len(row.done), len(row.runs)
    return (
        _words(row.case.name),
        *(_spread(row.figures[figure.key]) for figure in _FURTHER),
        Cell(number(cv * 100) if cv is not None else NOTHING),
        Cell(str(done) if done == started else f"{done} of {started}", warns=done < started),
    )


def _words(text: str) -> Cell:
    return Cell(text, is_number=False)


def _both_words(texts: tuple[str, str]) -> tuple[Cell, ...]:
    return tuple(map(_words, texts))


def _spread(found: Spread | None, supposed: float | None = None) -> Cell:
    remark = "" if supposed is None else f"supposed {supposed:g}"
    return Cell(number(found.median) if found else NOTHING, interval(found), remark)


def _stages(row: Row) -> str:
    stages = count(row.case.num_stages, "stage")
    if row.case.num_lanes > 1:
        stages += f" of {row.case.num_lanes} lanes"
    replicas = row.case.num_replicas
    return stages if replicas == 1 else f"{count(replicas, 'replica')} of {stages}"


def _batch(row: Row) -> Cell:
    """Prompts in flight at most; what fits where memory decides."""
    if row.case.batch is not None:
        return Cell(f"{row.case.batch:,}")
    return Cell(f"{row.places:,}" if row.places else NOTHING, "what fits")


# ---- for programs --------------------------------------------------------------------------------


def plain_row(experiment: ExperimentName, row: Row) -> dict[str, Any]:
    """A row as plain values, for `report.json`."""
    ratios = {"speedup": row.speedup, "efficiency": row.efficiency}
    return {
        "experiment": experiment,
        "case": row.case.name,
        "arm": row.case.arm,
        "num_nodes": row.case.num_nodes,
        "num_stages": row.case.num_stages,
        "num_replicas": row.case.num_replicas,
        "num_lanes": row.case.num_lanes,
        "num_prompts": row.case.num_prompts,
        "batch": row.case.batch,
        "size": row.size,
        "base": row.base or None,
        **{name: ratio and dataclasses.asdict(ratio) for name, ratio in ratios.items()},
        "figures": {key: found and dataclasses.asdict(found) for key, found in row.figures.items()},
        "stage_parts_s": [dict(parts) for parts in row.parts],
        "num_done": len(row.done),
        "num_runs": len(row.runs),
        "flags": dict(row.flags),
        "failures": [
            {"outcome": f.outcome, "reason": f.reason, "num_runs": f.num_runs} for f in row.failures
        ],
    }


def csv_text(plain_rows: Sequence[dict[str, Any]]) -> str:
    """`report.csv`: a line per case; `_low` and `_high` are the ends of the interval."""
    names = (
        "experiment", "case", "arm", "num_nodes", "num_stages", "num_replicas", "num_lanes",
        "num_prompts", "batch",
    )  # fmt: skip
    keys = ("speedup", "efficiency", *(figure.key for figure in FIGURES))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = [f"{key}{end}" for key in keys for end in ("", "_low", "_high")]
    writer.writerow([*names, *columns, "cv", "num_done", "num_runs", "flags", "failures"])
    for row in plain_rows:
        throughput = row["figures"][THROUGHPUT.key] or {}
        writer.writerow(
            [
                *(row[name] for name in names),
                *(value for key in keys for value in _ends(row, key)),
                throughput.get("cv"),
                row["num_done"],
                row["num_runs"],
                "; ".join(f"{flag}: {num}" for flag, num in row["flags"].items()),
                "; ".join(f"{f['outcome']}: {f['reason']}" for f in row["failures"]),
            ]
        )
    return file.getvalue()


def _ends(row: dict[str, Any], key: str) -> list[float | None]:
    found = row[key] if key in row else row["figures"][key]
    if found is None:
        return [None, None, None]
    return [found["median"], found["low"], found["high"]]
