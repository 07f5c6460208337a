"""`mpipipe simulate`: a job on machines that are not here, with the real scheduler.

This file is imported by `main`, so it imports nothing but typer before the command was chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["simulate"]

_CONFIG = "Configuration or model folder, as `mpipipe run` takes it; not needed with --from."
_WORDS = "Settings that win over the configuration."
_GPUS = 'As "2 x t4" or "h100, 3 x t4"; without it, CPU ranks of this host.'
_WORK = "PROMPTSxINPUTxOUTPUT(xtail) tokens, or PROMPTSxmixed; default: the configured prompts."
_FROM = "A run folder (log.steps=all): its plan, prompts and stage times, beside what it took."
_STANDING = "So many of the replicas stand for all; 0: as many as can be simulated in seconds."
_DISPATCH = "Of rank 0 for each message of the dispatch, and for each prompt in it (microseconds)."


def simulate(
    *,
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG|MODEL", help=_CONFIG, show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help=_WORDS)
    ] = None,
    gpus: Annotated[str, typer.Option(help=_GPUS)] = "",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that the GPUs are on.")] = 1,
    link: Annotated[str, typer.Option(help="Between nodes: 1GbE, 10GbE, HDR …")] = "10GbE",
    stages: Annotated[int, typer.Option(min=0, help="Of a replica; 0: as configured.")] = 0,
    replicas: Annotated[int, typer.Option(min=0, help="Pipelines; 0: as configured.")] = 0,
    work: Annotated[str, typer.Option(help=_WORK)] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of mixed lengths.")] = 0,
    from_run: Annotated[Path | None, typer.Option("--from", help=_FROM)] = None,
    stand_for_all: Annotated[int, typer.Option(min=0, help=_STANDING)] = 0,
    dispatch_us: Annotated[
        tuple[float, float], typer.Option(metavar="MESSAGE PROMPT", help=_DISPATCH)
    ] = (20.0, 5.0),
    trace: Annotated[Path | None, typer.Option(help="Write a Perfetto trace here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: ARG001 - read by `main`
) -> None:
    """Simulate a job: tokens/s, bubbles, load of rank 0, deadlocks; no GPU, torch or MPI."""
    from mpipipe.cli.simulation_job import SimulationRequest, simulate_command

    request = SimulationRequest(
        config=config,
        words=tuple(overrides or ()),
        gpus=gpus,
        num_nodes=nodes,
        link=link,
        num_stages=stages,
        num_replicas=replicas,
        work=work,
        seed=seed,
        from_run=from_run,
        stand_for_all=stand_for_all,
        dispatch_s=(dispatch_us[0] * 1e-6, dispatch_us[1] * 1e-6),
        trace=trace,
        as_json=as_json,
    )
    raise typer.Exit(simulate_command(request))
