"""What `mpipipe warm` does on a rank, and what it prints on the head."""

from __future__ import annotations

import os
from contextlib import suppress
from os.path import exists, isdir
from typing import TYPE_CHECKING

from mpipipe.cli.terminal import guard_terminal
from mpipipe.clock import MonotonicClock
from mpipipe.demo.model import cache_folder
from mpipipe.errors import MpipipeError
from mpipipe.job.warm import warm_up
from mpipipe.metrics.boot import BootTimeline
from mpipipe.planning.compiled_kernels import triton_cache
from mpipipe.progress import run_async
from mpipipe.topology.launcher import detect
from mpipipe.topology.process import process_age_s

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["boot_lines", "warm_command"]

_SHOWN_S = 0.05


def warm_command(config: Path, overrides: Sequence[str], *, debug: bool) -> int:
    """Boot on this rank and end; the exit code.

    Raises:
        MpipipeError: on the head, to be shown once; other ranks return its exit code silently.
    """
    guard_terminal()
    clock = MonotonicClock()
    boot = BootTimeline(clock, clock.now_s() - (process_age_s() or 0.0))

    def tell(ended: BootTimeline, problem: str) -> None:
        for line in boot_lines(ended, problem):
            print(line, flush=True)

    try:
        run_async(warm_up(config, overrides, boot, tell, debug=debug))
    except MpipipeError as error:
        if detect(os.environ).rank in (None, 0) or debug:
            raise
        return error.exit_code
    return 0


def boot_lines(boot: BootTimeline, problem: str = "") -> list[str]:
    """The parts of rank 0's boot, and where there are caches.

    `problem`: what kept kernels from being compiled ahead.
    """
    seconds: dict[str, float] = {}
    for part in boot.parts:
        seconds[part.name] = seconds.get(part.name, 0.0) + part.seconds
    told = [f"{name} {s:.1f} s" for name, s in seconds.items() if s >= _SHOWN_S]
    lines = [f"ready after {boot.wall_s:.1f} s: {' · '.join(told)}"]
    if problem:
        lines.append(f"kernels were not compiled ahead, ranks compiled what they use: {problem}")
    with suppress(RuntimeError):  # there is no home folder
        places = {"kernels": triton_cache(), "tokenizers": cache_folder() / "tokenizers"}
        lines += [f"{what}: {folder}" for what, folder in places.items() if isdir(folder)]
        kept = places["tokenizers"]
        # Not the methods of Path: they raise where a parent may not be entered.
        there = next(folder for folder in (kept, *kept.parents) if exists(folder))
        if not os.access(there, os.W_OK):
            lines.append(
                f"{kept} cannot be written: a tokenizer that is not in it is made anew at each "
                "start. Set MPIPIPE_CACHE, or warm it where it can be written"
            )
    return lines
