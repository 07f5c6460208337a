"""What a report says of a single run: its figures, stage by stage, boot, environment, command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpipipe.report.charts import LineChart
from mpipipe.report.document import Block, Cell, Commands, Heading, Notice, Table
from mpipipe.report.experiment_charts import parts_chart
from mpipipe.report.figures import FIGURES, PARTS, WALL_CLOCK, RunFacts, stage_parts
from mpipipe.report.numbers import NOTHING, count, number
from mpipipe.report.run_files import resource_use
from mpipipe.report.timeline import occupancy_charts, rate_curve

if TYPE_CHECKING:
    from mpipipe.report.charts import Chart
    from mpipipe.report.run_files import Line, RunFiles

__all__ = [
    "plain_run",
    "run_blocks_after_plots",
    "run_blocks_before_plots",
    "run_charts",
    "run_facts",
]


def run_facts(run: RunFiles) -> RunFacts:
    """The figures' source."""
    cpu, gpu = resource_use(run)
    wall_s = RunFacts(run.metrics, 0.0).number("phases", "wall_s") or 0.0
    energy_j = RunFacts(run.metrics, 0.0).number("energy_j")
    return RunFacts(run.metrics, wall_s, energy_j, cpu, gpu)


def run_blocks_before_plots(run: RunFiles) -> list[Block]:
    """Warnings and tables."""
    tables = [_figures_table(run), _stage_table(run), _boot_table(run), _attempts_table(run)]
    return [
        *(Notice(text) for text in _warnings(run)),
        *(table for table in tables if table is not None),
    ]


def run_charts(run: RunFiles) -> list[Chart]:
    """All plots that the run's files have values for."""
    parts = stage_parts(run_facts(run))
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


def run_blocks_after_plots(run: RunFiles) -> list[Block]:
    """Where it ran and the command that starts it again."""
    argv = [str(word) for word in run.manifest.get("argv") or ()]
    return [
        Heading("Environment"),
        _environment(run.manifest),
        *((Heading("Repeat it"), Commands((shlex.join(argv),))) if argv else ()),
    ]


def plain_run(run: RunFiles) -> dict[str, Any]:
    """The run as plain values, for `report.json`."""
    facts = run_facts(run)
    return {
        "run": run.manifest.get("run"),
        "figures": {figure.key: _value(run, facts, figure.key) for figure in FIGURES},
        "stage_parts_s": stage_parts(facts),
    }


def _value(run: RunFiles, facts: RunFacts, key: str) -> float | None:
    """A figure; a run without metrics has no wall clock."""
    figure = next(figure for figure in FIGURES if figure.key == key)
    return None if key == WALL_CLOCK.key and not run.metrics else figure.of(facts)


# ---- tables --------------------------------------------------------------------------------------


def _warnings(run: RunFiles) -> list[str]:
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
            f"the run took {count(len(attempts), 'attempt')}; figures and plots are of the last."
        )
    return warnings


def _figures_table(run: RunFiles) -> Table:
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
    ]
    return Table(
        "Measured",
        ("Figure", "Value", "Meaning"),
        tuple((_words(name), Cell(value), _words(meaning)) for name, value, meaning in rows),
    )


def _batch(pipeline: Mapping[str, Any]) -> str:
    slots, places = pipeline.get("num_slots"), pipeline.get("max_sequences_per_slot")
    if isinstance(slots, int) and isinstance(places, int):
        return f"{slots * places:,}"
    return NOTHING


def _stage_table(run: RunFiles) -> Table | None:
    facts = run_facts(run)
    rows = []
    for rank, parts in zip(facts.ranks, stage_parts(facts), strict=True):
        stage = rank.get("stage") or {}
        bubble = (stage.get("overall") or {}).get("bubble_ratio")
        rows.append(
            (
                _words(f"stage {stage.get('stage', rank.get('rank'))}"),
                _words(_text(rank.get("host"))),
                *(Cell(number(parts[part])) for part in PARTS),
                Cell(number(None if bubble is None else 100 * bubble)),
                Cell(number(rank.get("load_s"))),
            )
        )
    header = ("Stage", "Host", *(f"{part} (s)" for part in PARTS), "Bubble (%)", "Load (s)")
    notes = (
        (
            "compute to overhead: the parts of the time while generating; I/O: reading prompts and "
            "weights before."
        ),
    )
    return Table("Where the time of each stage went", header, tuple(rows), notes) if rows else None


def _boot_table(run: RunFiles) -> Table | None:
    boots = [
        {event["name"]: event["seconds"] for event in rank.get("boot") or ()}
        for rank in run_facts(run).ranks
    ]
    names = list(dict.fromkeys(name for boot in boots for name in boot))
    if not names:
        return None
    return Table(
        "Boot, event by event",
        ("Event", *(f"rank {rank} (s)" for rank in range(len(boots)))),
        tuple((_words(name), *(Cell(number(boot.get(name))) for boot in boots)) for name in names),
    )


def _attempts_table(run: RunFiles) -> Table | None:
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


def _rates(run: RunFiles) -> LineChart | None:
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
