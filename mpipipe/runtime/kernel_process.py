"""The process that compiles a host's kernels: `python -m mpipipe.runtime.kernel_process`.

It starts when a rank starts and imports what it needs beside it. One line of JSON in, an `Order`,
when the ranks know their plan; then it runs the stages dry and compiles what they launch, in
several processes, while the ranks read weights. One line out, a `Compiled`. The end of its input
ends it, so it does not outlive its rank.

It never starts MPI or CUDA. What it leaves undone, a rank compiles when it launches it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpipipe.models.foreign import in_short
from mpipipe.plain_values import from_json, to_json
from mpipipe.planning.plan import PipelinePlan

if TYPE_CHECKING:
    from mpipipe.models.kernels.ahead import Launch

__all__ = ["Compiled", "Order", "main"]


@dataclass(frozen=True, slots=True)
class Order:
    """What to compile: the kernels of some stages."""

    plan: PipelinePlan
    stages: tuple[int, ...]
    capability: tuple[int, int]  # of the GPUs
    num_processors: int  # of each
    num_processes: int  # that compile at once


@dataclass(frozen=True, slots=True)
class Compiled:
    """What came of it."""

    num_kernels: int
    seconds: float
    problem: str = ""  # empty: none


def main() -> None:
    """Serve one order."""
    # A terminal's ^C and a scheduler's signals are meant for the ranks.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # ranks block some
    import mpipipe.models.kernels.ahead  # noqa: F401 - as what follows
    from mpipipe.stage.dry_run import prepare

    prepare()  # seconds, while there is nothing to do yet

    line = sys.stdin.readline()
    _end_with_input()
    if line:
        compiled = _answer(from_json(Order, line))
        sys.stdout.write(to_json(compiled) + "\n")
        sys.stdout.flush()


def _answer(order: Order) -> Compiled:
    began_s = time.monotonic()
    try:
        launches = _launches(order)
        from mpipipe.models.kernels.ahead import compile_launches

        compile_launches(launches, order.num_processes)
    except Exception as error:  # noqa: BLE001 - Triton's compile errors derive from Exception alone
        return Compiled(0, time.monotonic() - began_s, in_short(error))
    return Compiled(len(launches), time.monotonic() - began_s)


def _launches(order: Order) -> list[Launch]:
    from mpipipe.models.kernels.ahead import recorded_launches
    from mpipipe.models.kernels.launch import GpuFacts
    from mpipipe.models.kernels.probe import launch_trial
    from mpipipe.stage.dry_run import dry_run

    with recorded_launches(GpuFacts(order.capability, order.num_processors)) as launches:
        known = [dry_run(order.plan, order.plan.stages[number]) for number in order.stages]
        if any(known):
            launch_trial("meta")
    return launches


def _end_with_input() -> None:
    """From now on, the rank's end ends this process and those that it started."""

    def watch() -> None:
        while os.read(0, 1):  # not through Python's file, whose lock forked processes would miss
            pass
        os.killpg(0, signal.SIGKILL)  # it leads a group, see `kernels_ahead`

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
