"""What a report says of a single run: its figures, stage by stage, boot, environment, command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpipipe.report.charts import LineChart
from mpipipe.report.document import Block, Cell, Commands, Heading, Notice, Table, Text
from mpipipe.report.experiment_charts import parts_chart
from mpipipe.report.figures import FIGURES, PARTS, WALL_CLOCK, RunFacts, stage_parts
from mpipipe.report.numbers import NOTHING, count, number
from mpipipe.report.run_files import resource_use
from mpipipe.report.timeline import occupancy_charts, rate_curve

if TYPE_CHECKING:
    from mpipipe.logs.reading import Line
    from mpipipe.metrics.spared import SparedWork
    from mpipipe.report.charts import Chart
    from mpipipe.report.run_files import RunLines

__all__ = [
    "plain_run",
    "run_blocks_after_plots",
    "run_blocks_before_plots",
    "run_charts",
    "run_facts",
]


def run_facts(run: RunLines) -> RunFacts:
    """The figures' source."""
    cpu, gpu = resource_use(run)
    wall_s = RunFacts(run.metrics, 0.0).number("phases", "wall_s") or 0.0
    energy_j = RunFacts(run.metrics, 0.0).number("energy_j")
    return RunFacts({**run.metrics, "time": run.time.time}, wall_s, energy_j, cpu, gpu)


def run_blocks_before_plots(run: RunLines) -> list[Block]:
    """Warnings and tables."""
    tables = [_figures_table(run), _stage_table(run), _boot_table(run), _attempts_table(run)]
    return [
        *(Notice(text) for text in _warnings(run)),
        Text(f"{run.time.culprit.sentence}.", "What held it up:"),
        *(table for table in tables if table is not None),
    ]


def run_charts(run: RunLines) -> list[Chart]:
    """All plots that the run's files have values for."""
    parts = _parts(run)
    bars = parts_chart(
        [("", parts)] if parts else [],
        "stage",
        "Seconds of each stage while generating, and its reading of files before.",
    )
    rates = _rates(run)
    return [
        *([bars] if bars is not None else []),
        *([rates] if rates is not None else []),
        *occupancy_charts(run, "this run"),
    ]


def run_blocks_after_plots(run: RunLines) -> list[Block]:
    """Where it ran and the command that starts it again."""
    argv = [str(word) for word in run.manifest.get("argv") or ()]
    launch = run.manifest.get("launch") or {}
    ranks = count(int(launch.get("num_ranks") or 1), "rank")
    command = (f"# on {ranks}, started by {launch.get('launcher') or NOTHING}", shlex.join(argv))
    return [
        Heading("Environment"),
        _environment(run.manifest),
        *((Heading("Repeat it"), Commands(command)) if argv else ()),
    ]


def plain_run(run: RunLines) -> dict[str, Any]:
    """The run as plain values, for `report.json`."""
    facts = run_facts(run)
    return {
        "run": run.manifest.get("run"),
        "figures": {figure.key: _value(run, facts, figure.key) for figure in FIGURES},
        "stage_parts_s": _parts(run),
        "spared": run.time.to_dict()["spared"],
    }


def _value(run: RunLines, facts: RunFacts, key: str) -> float | None:
    """A figure; a run without metrics has no wall clock."""
    figure = next(figure for figure in FIGURES if figure.key == key)
    return None if key == WALL_CLOCK.key and not run.metrics else figure.of(facts)


def _parts(run: RunLines) -> list[dict[str, float]]:
    """Of each stage; of a run that was killed what its steps tell."""
    if run.metrics:
        return stage_parts(run_facts(run))
    times = [rank.seconds for rank in run.time.ranks]
    return [{part: seconds.get(part, 0.0) for part in PARTS} for seconds in times]


# ---- tables --------------------------------------------------------------------------------------


def _warnings(run: RunLines) -> list[str]:
    warnings = []
    if not run.metrics:
        warnings.append(
            "there is no metrics.json: the run still goes on, or it was killed; only what its "
            "other files tell is shown."
        )
    if run.metrics.get("state") == "stopped":
        warnings.append("the run was told to stop before all prompts were complete.")
    failed = RunFacts(run.metrics, 0.0).number("requests", "num_failed")
    if failed:
        warnings.append(f"{count(int(failed), 'prompt')} became error records.")
    attempts = run.manifest.get("attempts") or ()
    if len(attempts) > 1:
        warnings.append(
            f"the run took {count(len(attempts), 'attempt')}; figures and plots are of attempt "
            f"{run.time.attempt}."
        )
    return warnings


def _figures_table(run: RunLines) -> Table:
    facts = run_facts(run)
    config = run.manifest.get("config") or {}
    pipeline = config.get("pipeline") or {}
    launch = run.manifest.get("launch") or {}
    hosts = {row.get("host") for row in run.manifest.get("hosts") or ()}
    done = facts.number("requests", "num_completed")
    rows = [
        ("Nodes", str(launch.get("num_nodes") or len(hosts) or NOTHING), "hosts of the ranks"),
        ("Stages", _text(pipeline.get("num_stages")), "ranks of the pipeline"),
        ("Prompts", NOTHING if done is None else f"{done:,.0f}", "completed"),
        ("Batch size", _batch(pipeline), "prompts in flight at most"),
        *(
            (figure.title, number(_value(run, facts, figure.key)), figure.meaning)
            for figure in FIGURES
        ),
        *_spared_rows(run.time.spared),
    ]
    return Table(
        "Measured",
        ("Figure", "Value", "Meaning"),
        tuple((_words(name), Cell(value), _words(meaning)) for name, value, meaning in rows),
    )


def _spared_rows(spared: SparedWork) -> list[tuple[str, str, str]]:
    """Nothing where no prompts begin alike and nothing was drafted."""
    rows = []
    if spared.num_shared_tokens:
        told = "prompt tokens not computed: other prompts begin in the same way"
        rows.append(("Shared prefixes", f"{spared.num_shared_tokens:,}", told))
    if drafts := spared.words().get("drafts"):
        use, told = spared.drafts, ", ".join(drafts[1:])
        value = f"{use.num_accepted:,} of {use.num_drafted:,}"
        rows.append(("Drafts", value, f"drafted tokens accepted{told and f': {told}'}"))
    return rows


def _batch(pipeline: Mapping[str, Any]) -> str:
    slots, places = pipeline.get("num_slots"), pipeline.get("max_sequences_per_slot")
    if isinstance(slots, int) and isinstance(places, int):
        return f"{slots * places:,}"
    return NOTHING


def _stage_name(run: RunLines, place: int) -> str:
    """Of the rank that reported in this place; ranks that share a stage are told apart."""
    reports = (run.metrics or {}).get("ranks") or []
    if place >= len(reports):
        return f"stage {place}"
    places = [(report.get("replica"), report["stage"]["stage"]) for report in reports]
    name = f"stage {places[place][1]}"
    return f"{name}, rank {reports[place]['rank']}" if places.count(places[place]) > 1 else name


def _stage_table(run: RunLines) -> Table | None:
    rows = []
    for place, parts in enumerate(_parts(run)):
        generating_s = sum(parts[part] for part in PARTS[:-1])
        bubble = 1 - parts["compute"] / generating_s if generating_s else None
        rows.append(
            (
                _words(_stage_name(run, place)),
                _words(_host(run, place)),
                *(Cell(number(parts[part])) for part in PARTS),
                Cell(number(None if bubble is None else 100 * bubble)),
            )
        )
    header = ("Stage", "Host", *(f"{part} (s)" for part in PARTS), "Bubble (%)")
    notes = (
        "compute to overhead: parts of the time while generating; I/O: reading prompts, weights.",
    )
    return Table("Where the time of each stage went", header, tuple(rows), notes) if rows else None


def _host(run: RunLines, stage: int) -> str:
    ranks = run_facts(run).ranks
    found = ranks[stage].get("host") if stage < len(ranks) else run.time.ranks[stage].host
    return str(found or NOTHING)


def _boot_table(run: RunLines) -> Table | None:
    ranks = run_facts(run).ranks
    boots = [_boot_seconds(rank.get("boot") or ()) for rank in ranks]
    names = list(dict.fromkeys(name for boot in boots for name in boot))
    if not names:
        return None
    return Table(
        "Boot, event by event",
        ("Event", *(f"rank {rank.get('rank', place)} (s)" for place, rank in enumerate(ranks))),
        tuple((_words(name), *(Cell(number(boot.get(name))) for boot in boots)) for name in names),
    )


def _boot_seconds(boot: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By name; an event that something interrupted comes in several parts."""
    seconds: dict[str, float] = {}
    for part in boot:
        seconds[part["name"]] = seconds.get(part["name"], 0.0) + part["seconds"]
    return seconds


def _attempts_table(run: RunLines) -> Table | None:
    attempts: Sequence[Mapping[str, Any]] = run.metrics.get("attempts") or ()
    if len(attempts) < 2:
        return None
    header = ("Attempt", "State", "Wall clock (s)", "Generating (s)", "Completed", "Output tokens")
    keys = ("wall_s", "generate_s", "num_completed", "num_output_tokens")
    return Table(
        "Attempts",
        header,
        tuple(
            (
                Cell(_text(attempt.get("attempt"))),
                _words(_text(attempt.get("state"))),
                *(Cell(number(attempt.get(key))) for key in keys),
            )
            for attempt in attempts
        ),
    )


def _words(text: str) -> Cell:
    return Cell(text, is_number=False)


def _text(value: object) -> str:
    return NOTHING if value is None else str(value)


# ---- time and place ------------------------------------------------------------------------------


def _rates(run: RunLines) -> LineChart | None:
    head: Sequence[Line] = run.samples.get(0, ())
    began_s = run.began_s
    if began_s is None:
        return None
    points = [
        (line["t_s"] - began_s, float(line["num_output_tokens"]))
        for line in head
        if line.get("num_output_tokens") is not None and line["t_s"] >= began_s
    ]
    curve = rate_curve("this run", [(0.0, 0.0), *points], 0)
    if curve is None:
        return None
    return LineChart(
        "Tokens per second over time",
        "Output tokens between two samples (log.sample_interval_s).",
        "time since generating began (s)",
        "output tokens/s",
        (curve,),
        x_from_zero=True,
    )


def _environment(manifest: Mapping[str, Any]) -> Table:
    git = manifest.get("git") or {}
    launch = manifest.get("launch") or {}
    versions = manifest.get("versions") or {}
    facts = {
        "started": _text(manifest.get("started")),
        "mpipipe": _text(manifest.get("mpipipe")),
        "commit": f"{git['commit']}{' (changed)' if git.get('dirty') else ''}" if git else "",
        "launch": ", ".join(f"{key} {value}" for key, value in launch.items() if value),
        **{f"node {node.get('host')}": _node(node) for node in manifest.get("nodes") or ()},
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items() if value),
        "environment": " ".join(
            f"{name}={value}" for name, value in sorted((manifest.get("environment") or {}).items())
        ),
    }
    return Table(
        "Where it ran",
        ("What", "Value"),
        tuple((_words(name), _words(value)) for name, value in facts.items() if value),
    )


def _node(node: Mapping[str, Any]) -> str:
    gpus = [str(gpu.get("name")) for gpu in node.get("gpus") or ()]
    memory = node.get("memory_bytes")
    parts = [
        node.get("cpu_model"),
        f"{node['num_cores']} cores" if node.get("num_cores") else None,
        f"{memory / 2**30:.1f} GiB" if memory else None,
        ", ".join(gpus) or None,
        f"Linux {node['kernel']}" if node.get("kernel") else None,
        f"container {node['container']}" if node.get("container") else None,
    ]
    return ", ".join(str(part) for part in parts if part)
