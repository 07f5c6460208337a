"""`mpipipe bench dispatch`: rank 0 hands out short prompts; a table and a JSON line.

This file is imported by `main`, so it imports nothing but typer before the command was chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mpipipe.bench.dispatch import DispatchRates

__all__ = ["bench_dispatch"]


def bench_dispatch(
    *,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, all alike.")] = 40_000,
    tokens_in: Annotated[int, typer.Option("--input", min=1, help="Tokens per prompt.")] = 16,
    tokens_out: Annotated[int, typer.Option("--output", min=1, help="Tokens to make.")] = 1,
    capacity: Annotated[int, typer.Option(min=1, help="Sequences that a replica runs.")] = 256,
    replicas: Annotated[int, typer.Option(min=1, help="Virtual ones, on one rank.")] = 8,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Prompts/s that rank 0 hands out to replicas: `mpirun -n 9 mpipipe bench dispatch`."""
    from mpipipe.bench.dispatch import DispatchOptions, measure_dispatch
    from mpipipe.clock import MonotonicClock
    from mpipipe.progress import run_async

    options = DispatchOptions(prompts, tokens_in, tokens_out, capacity, replicas)
    rates = run_async(measure_dispatch(MonotonicClock(), options, debug=debug))
    if rates is not None:
        _show(rates)


def _show(rates: DispatchRates) -> None:
    import dataclasses
    import json

    print(
        f"{rates.num_prompts:,} prompts to {rates.num_replicas} replicas, stages answer at once: "
        f"{rates.prompts_per_s:,.0f} prompts/s in {rates.elapsed_s:.2f} s"
    )
    print(
        f"rank 0: {rates.handling_us:.1f} µs of CPU a prompt to hand out and take back, "
        f"{rates.decoding_us:.1f} µs to decode; busy {rates.busy_share:.0%}, so at most "
        f"{rates.most_prompts_per_s:,.0f} prompts/s; its process used {rates.process_share:.0%} of "
        "a core, polling included"
    )
    print(
        f"{rates.messages_per_s:,.0f} messages/s, {rates.bytes_per_s / 1e6:,.2f} MB/s; from rank 0 "
        f"to the replica and back {rates.handed_to_told_p50_s * 1e3:,.1f} ms p50"
    )
    derived = {
        "prompts_per_s": rates.prompts_per_s,
        "busy_share": rates.busy_share,
        "most_prompts_per_s": rates.most_prompts_per_s,
    }
    print(json.dumps({**dataclasses.asdict(rates), **derived}))
