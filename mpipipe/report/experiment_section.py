"""What a report says of an experiment: warnings, verdicts, tables, plots, environment, commands."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from mpipipe.report.document import Block, Cell, Commands, Heading, Notice, Table, Text
from mpipipe.report.experiment_charts import experiment_charts, memory_limit_of
from mpipipe.report.hypotheses import verdict
from mpipipe.report.numbers import count, interval, measured, number
from mpipipe.report.tables import further_table, main_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mpipipe.experiments.record import Record
    from mpipipe.experiments.statistics import Spread
    from mpipipe.report.charts import Chart
    from mpipipe.report.rows import Row, Section

__all__ = ["TITLES", "blocks_after_plots", "blocks_before_plots", "section_charts"]

TITLES = {
    "strong": "Strong scaling",
    "weak": "Weak scaling",
    "batch": "Batch size",
    "arrangements": "Replicas, stages and lanes",
}
_ARM_WORDS = {
    "memory-filling": "the same prompts, as many in flight as memory holds",
    "fixed-total": "the same prompts, the same number in flight",
    "weak": "constant work per stage",
    "batch": "the same prompts and stages, more in flight",
    "arrangements": "the same prompts on the same ranks",
}
_FLAG_WORDS = {
    "other tokens": "these made other tokens than most runs of the case, so their speed is not "
    "that of the same work",
    "throttled": "a GPU had lowered its clocks",
    "foreign load": "the machine also did other work",
    "too short": "they generated for too short a time to show a steady speed",
}


def blocks_before_plots(section: Section, *, hypotheses: bool) -> list[Block]:
    """Heading, what is wrong, the verdicts, the tables."""
    name = section.matrix.experiment
    label = f" ({section.label})" if section.label not in {"", name} else ""
    return [
        Heading(f"{TITLES[name]}{label}"),
        *(Notice(text) for text in _warnings(section)),
        *_verdicts(section),
        main_table(name, section.rows, hypotheses=hypotheses),
        further_table(section.rows),
    ]


def section_charts(section: Section) -> list[Chart]:
    """The plots of the section that need nothing but the records."""
    return experiment_charts(section, _machine(section.records))


def blocks_after_plots(section: Section) -> list[Block]:
    """Where it ran, how it was measured, and how to repeat it."""
    return [
        Heading("Environment", 3),
        _environment(section),
        Heading("Repeat it", 3),
        Text("The whole experiment, then the first launch of each case."),
        Commands(tuple(_commands(section))),
    ]


# ---- words ---------------------------------------------------------------------------------------


def _warnings(section: Section) -> list[str]:
    """What a reader must know before the figures."""
    rows = section.rows
    warnings = []
    if section.verdict.num_missing:
        warnings.append(
            f"the experiment is not complete: {count(section.verdict.num_missing, 'launch')} of "
            f"{len(section.matrix.order)} have no record yet; the same command goes on with them."
        )
    for flag, words in _FLAG_WORDS.items():
        hit = [row for row in rows if row.flags.get(flag)]
        if hit:
            names = ", ".join(f"{row.case.name} ({count(row.flags[flag], 'run')})" for row in hit)
            warnings.append(f"{flag}: {words}: {names}.")
    failed = [row.case.name for row in rows if row.failures]
    if failed:
        warnings.append(f"runs without a result, with the reason in the row: {', '.join(failed)}.")
    warnings += [
        f"{row.case.name}: memory holds {row.places} prompts at once, and there are "
        f"{row.case.num_prompts}: more prompts would fill it."
        for row in rows
        if row.case.batch is None and row.places > row.case.num_prompts
    ]
    unsound = [row.case.name for row in rows if row.throughput and not row.throughput.is_sound]
    if unsound:
        warnings.append(
            "too few runs for an interval of 90 %, so no verdict is drawn from them; five are "
            f"needed: {', '.join(unsound)}."
        )
    return warnings


def _verdicts(section: Section) -> list[Text]:
    texts = []
    name = section.matrix.experiment
    for arm, rows in section.arms.items():
        if name == "arrangements":
            texts.append(Text(_which_is_fastest(section), f"{_arm_words(rows)}:".capitalize()))
            continue
        seen = _what_the_sweep_found(section) if name == "batch" else _what_scaling_found(rows)
        words = _arm_words(rows)
        label = f"{arm}, {words}:" if len(section.arms) > 1 else f"{words}:"
        texts += [Text(seen, label.capitalize()), Text(verdict(name, rows), "Supposed:")]
    return texts


def _arm_words(arm: Sequence[Row]) -> str:
    """What its cases have in common; with --batch memory does not decide how many are in flight."""
    case = arm[0].case
    if case.arm == "memory-filling" and case.batch is not None:
        each = case.batch // (case.num_replicas * case.num_stages)
        return f"the same prompts, {each} in flight on each stage"
    return _ARM_WORDS[case.arm]


def _which_is_fastest(section: Section) -> str:
    best = section.verdict.best
    if best is None or section.verdict.num_missing:
        return "No verdict yet: some arrangements have not all of their runs."
    row = next(row for row in section.rows if row.case.name == best.case.name)
    sentence = section.verdict.notes[-1]
    if row.case.name == row.base or row.speedup is None:
        return sentence
    words = f"{measured(row.speedup)} times the tokens per second of {row.base}"
    return f"{sentence} That is {words}, {_beside_one(row.speedup)}."


def _what_scaling_found(arm: Sequence[Row]) -> str:
    """The largest case with a verdict, beside its base, and beside what was possible."""
    last = next((row for row in reversed(arm) if row.is_comparable), None)
    if last is None or last.case.name == last.base:
        return "Too few cases came to a result for a comparison."
    first = next(row for row in arm if row.case.name == last.base)
    assert last.speedup is not None  # as all runs of both came to a result
    assert last.efficiency is not None
    more = last.size / first.size
    words = _beside_one(last.speedup)
    sentence = (
        f"{count(last.size, _unit(last))} made {measured(last.speedup)} times the tokens per "
        f"second of {first.size}, {words}: {measured(last.efficiency)} of the ideal {more:g} times."
    )
    if first.ceiling is not None and last.ceiling is not None:
        possible = last.ceiling.model_tokens_per_s / first.ceiling.model_tokens_per_s
        sentence += f" The cost model allows {number(possible)} times at best."
    return sentence


def _unit(row: Row) -> str:
    return "stage" if row.size == row.case.num_stages else "rank"


def _beside_one(speedup: Spread) -> str:
    if speedup.is_above(1):
        return "faster beyond the noise"
    if speedup.is_below(1):
        return "slower beyond the noise"
    if not speedup.is_sound:
        return "from too few runs for a verdict"
    return "which cannot be told apart from no gain"


def _what_the_sweep_found(section: Section) -> str:
    done = [(row, row.throughput) for row in section.rows if row.throughput is not None]
    if not done:
        return "No batch came to a result."
    row, best = max(done, key=lambda pair: pair[1].median)
    around = interval(best)
    safe, limit = section.verdict.largest_safe_batch, memory_limit_of(section.rows)
    sentences = [
        (
            f"The highest throughput was {number(best.median)} tokens/s"
            f"{f' ({around})' if around else ''}, at a batch of {row.size}."
        ),
        section.verdict.notes[-1],  # on the knee
        *([f"The largest batch that is safe is {safe}."] if safe else []),
        *([f"A batch of {limit.size} did not fit into memory."] if limit else []),
    ]
    return " ".join(sentences)


def _machine(records: Sequence[Record]) -> str:
    """Hosts and GPUs, in a few words."""
    hosts = sorted({host for record in records for host in record.hosts})
    gpus = sorted({gpu for record in records for gpu in record.gpus})
    place = count(len(hosts), "host") if len(hosts) != 1 else hosts[0]
    return f"On {place}, {', '.join(gpus) if gpus else 'CPU'}." if hosts else ""


# ---- environment and commands --------------------------------------------------------------------


def _environment(section: Section) -> Table:
    records, matrix = section.records, section.matrix
    versions: dict[str, set[str]] = {}
    for record in records:
        for name, version in record.versions.items():
            versions.setdefault(name, set()).add(str(version))
    facts = {
        "hosts": _several(host for record in records for host in record.hosts),
        "GPUs": _several(gpu for record in records for gpu in record.gpus) or "none",
        "commit": _several(record.commit or "no checkout" for record in records),
        "versions": ", ".join(
            f"{name} {' and '.join(sorted(found))}" for name, found in sorted(versions.items())
        ),
        "configuration": shlex.join([matrix.config, *matrix.words]),
        "configuration hash": _several(record.config_hash for record in records),
        "order": f"{count(len(records), 'launch')}, {_order_words(records)} "
        f"{_several(str(record.seed) for record in records)}",
        "first and last launch": " – ".join(_first_and_last([r.started for r in records])),
        **{
            f"ceiling of {rows[-1].case.name}": rows[-1].ceiling.reason
            for rows in section.arms.values()
            if rows[-1].ceiling is not None
        },
        "GPU clock (MHz)": _several(
            number(record.sm_clock_mhz) for record in records if record.sm_clock_mhz
        ),
    }
    return Table(
        "Where and how it was measured",
        ("What", "Value"),
        tuple(
            (Cell(name, is_number=False), Cell(value, is_number=False))
            for name, value in facts.items()
            if value
        ),
    )


def _order_words(records: Sequence[Record]) -> str:
    """Whether they were launched as planned; the cases of a job array go on beside each other."""
    started = [record.order for record in sorted(records, key=lambda r: (r.started, r.order))]
    if started == sorted(started):
        return "cases and arms interleaved at random, seed"
    return "each case in the order given by seed"


def _several(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


def _first_and_last(times: Sequence[str]) -> list[str]:
    return [min(times), max(times)] if len(times) > 1 else list(times)


def _commands(section: Section) -> list[str]:
    lines = [shlex.join(section.matrix.command), ""]
    for row in section.rows:
        lines += [f"# {row.case.name}", *(shlex.join(run.command) for run in row.runs[:1])]
    return lines
