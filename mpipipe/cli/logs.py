"""`mpipipe logs …`: questions to the files of a run, from a login node, without torch and MPI.

Each command reads, asks `mpipipe.logs`, and shows; `logs_view` has how. This file is imported by
`main`, so it imports nothing but typer before a command was chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["logs"]

logs = typer.Typer(help="Ask the files of a run: where did the time go?", no_args_is_help=True)

_RUN = "A run folder, or a folder with runs: then the latest."
Run = Annotated[Path, typer.Argument(metavar="RUN", help=_RUN, show_default=False)]
Attempt = Annotated[
    int | None,
    typer.Option(min=1, help="Which start of the run; default: the last that generated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@logs.command()
def summary(
    run: Run,
    attempt: Attempt = None,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """Where each second of the run went, and what held it up."""
    from mpipipe.cli.logs_view import show_summary
    from mpipipe.logs.attempts import find_attempt
    from mpipipe.logs.facts import read_facts
    from mpipipe.logs.summary import summarise

    files = find_attempt(run, attempt)
    facts = read_facts(files, attempt)
    metrics = files.document("metrics.json")
    is_told = metrics.get("attempt", facts.num_attempts) == facts.attempt
    show_summary(files, facts, summarise(facts, metrics if is_told else {}), as_json=as_json)


@logs.command()
def requests(
    *,
    run: Run,
    slowest: Annotated[int, typer.Option(min=0, help="How many to list.")] = 10,
    only: Annotated[str | None, typer.Option("--id", help="This prompt only, in full.")] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Default: all.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """The slowest prompts, and percentiles over all."""
    from mpipipe.cli.logs_view import show_requests
    from mpipipe.logs.attempts import find_attempt
    from mpipipe.logs.prompts import read_requests

    files = find_attempt(run, attempt)
    lines = files.lines("requests.jsonl", attempt)
    figures = read_requests(lines, num_slowest=slowest, only=only)
    show_requests(files, figures, whole=only is not None, as_json=as_json)


@logs.command()
def steps(
    run: Run,
    least: Annotated[float, typer.Option(min=0.0, help="A stall is so many seconds.")] = 0.5,
    attempt: Attempt = None,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """How long steps take, and the stalls: which step, which rank, why."""
    from mpipipe.cli.logs_view import show_steps
    from mpipipe.logs.attempts import find_attempt
    from mpipipe.logs.facts import read_facts
    from mpipipe.logs.step_report import report_steps

    files = find_attempt(run, attempt)
    facts = read_facts(files, attempt)
    show_steps(files, report_steps(facts, least), as_json=as_json)


@logs.command()
def samples(
    run: Run,
    all_ranks: Annotated[bool, typer.Option("--all", help="All ranks, not the head only.")] = False,
    attempt: Attempt = None,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """Tokens per second, memory and load over time."""
    from mpipipe.cli.logs_view import show_samples
    from mpipipe.logs.attempts import choose_attempt, find_attempt
    from mpipipe.logs.clocks import read_clocks
    from mpipipe.logs.rates import intervals

    files = find_attempt(run, attempt)
    chosen = attempt or choose_attempt(files)
    clocks = read_clocks(files.lines("clock.jsonl", chosen))
    found = []
    for rank in files.ranks() if all_ranks else files.ranks()[:1]:
        found += intervals(rank, files.sample_lines(rank, chosen), clocks)
    show_samples(files, found, as_json=as_json)


@logs.command()
def errors(
    run: Run,
    warnings: Annotated[bool, typer.Option("--warnings", help="Warnings, too.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """What went wrong on any rank, in the order in which it happened."""
    from mpipipe.cli.logs_view import show_problems
    from mpipipe.logs.problems import find_problems
    from mpipipe.logs.reading import find_run

    files = find_run(run)
    show_problems(files, find_problems(files, with_warnings=warnings), as_json=as_json)


@logs.command()
def timeline(
    run: Run,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    steps: Annotated[int, typer.Option(min=0, help="The last of each rank; 0: all.")] = 20_000,
    attempt: Attempt = None,
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """All ranks on one clock, as JSON for ui.perfetto.dev or chrome://tracing."""
    from mpipipe.cli.logs_view import show_written
    from mpipipe.logs.attempts import choose_attempt, find_attempt
    from mpipipe.logs.timeline import write_timeline

    files = find_attempt(run, attempt)
    num_events = write_timeline(files, output, attempt or choose_attempt(files), steps)
    show_written(files, output, num_events)


@logs.command()
def tail(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Of each rank.")] = 10,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """The last events of all ranks, in one stream."""
    from mpipipe.cli.logs_view import show_tail
    from mpipipe.logs.reading import find_run
    from mpipipe.logs.tail import LogFollower

    show_tail(LogFollower(find_run(run), lines), follow=follow, as_json=as_json)


@logs.command()
def diff(
    *,
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help=_RUN, show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help=_RUN, show_default=False)],
    least: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Leave out figures that changed by less.")
    ] = 0.02,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """What is different between two runs: settings, environment, versions, figures."""
    from mpipipe.cli.logs_view import show_differences
    from mpipipe.logs.difference import find_differences
    from mpipipe.logs.reading import find_run

    both = [find_run(first), find_run(second)]
    mine, theirs = (
        (files.document("manifest.json"), files.document("metrics.json")) for files in both
    )
    show_differences(both, find_differences(mine, theirs, least_change=least), as_json=as_json)


@logs.command()
def sql(
    run: Run,
    statement: Annotated[str, typer.Argument(help="SQL over run_log, steps, samples, …")],
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """Any other question, in SQL: run_log, boot, steps, samples, requests, messages, clock."""
    from mpipipe.cli.logs_view import show_rows
    from mpipipe.logs.reading import find_run
    from mpipipe.logs.sql import query

    columns, found = query(find_run(run), statement)
    show_rows(columns, found, as_json=as_json)


@logs.command("files")
def files_page() -> None:
    """Print what every file of a run holds."""
    from mpipipe.logs.pages import FILES_PAGE, page

    typer.echo(page(FILES_PAGE), nl=False)


@logs.command("questions")
def questions_page() -> None:
    """Print ten questions with the commands that answer them."""
    from mpipipe.logs.pages import QUESTIONS_PAGE, page

    typer.echo(page(QUESTIONS_PAGE), nl=False)


@logs.command("lnav")
def lnav_format() -> None:
    """Print the format file for lnav: `mpipipe logs lnav > mpipipe.lnav.json`."""
    from mpipipe.logs.pages import LNAV_FORMAT, page

    typer.echo(page(LNAV_FORMAT), nl=False)
