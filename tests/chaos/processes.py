"""The processes of one run, found in /proc: they carry a mark in their environment.

The mark is inherited, so that a process is found when its parents are gone, too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MARK", "Process", "Rank", "end_all", "marked", "others", "ranks"]

MARK = "MPIPIPE_CHAOS_RUN"
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
_END_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Process:
    """One living process."""

    pid: int
    parent: int
    command: str
    rank: int | None  # as its launcher numbers it; None: it is no rank

    @property
    def label(self) -> str:
        """For people."""
        of_rank = "" if self.rank is None else f" (rank {self.rank})"
        return f"{self.pid} {self.command[:60]}{of_rank}"


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank: its worker, and the process that watches over it where there is one."""

    number: int
    worker: Process
    supervisor: Process | None


def marked(mark: str) -> list[Process]:
    """All living processes of the run with that mark; zombies are none."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                process = _read(folder, mark)
                if process is not None:
                    found.append(process)
    return sorted(found, key=lambda process: process.pid)


def _read(folder: Path, mark: str) -> Process | None:
    environment = dict(
        part.split("=", 1)
        for part in (folder / "environ").read_bytes().decode("utf-8", "replace").split("\0")
        if "=" in part
    )
    if environment.get(MARK) != mark:
        return None
    # "pid (name) state parent …", where a name may hold anything.
    state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
    if state in "ZX":
        return None
    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    rank = _rank_of(environment) if _is_mpipipe(command) else None
    return Process(int(folder.name), int(parent), command.strip(), rank)


def _rank_of(environment: Mapping[str, str]) -> int | None:
    for name in _RANK_VARIABLES:
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return None


def _is_mpipipe(command: str) -> bool:
    words = command.split()
    return "mpipipe" in words[1:4] and "run" in words[1:5] and "python" in words[0]


def ranks(processes: list[Process]) -> dict[int, Rank]:
    """The ranks among `processes`. Of two that are parent and child the child does the work."""
    found: dict[int, Rank] = {}
    for number in sorted({process.rank for process in processes if process.rank is not None}):
        own = {process.pid: process for process in processes if process.rank == number}
        inner = [process for process in own.values() if process.parent in own]
        # A worker may have forked for a moment itself: the one right below the top is it.
        tops = [process for process in own.values() if process.parent not in own]
        below = [process for process in inner if process.parent == tops[0].pid]
        worker = below[0] if below else tops[0]
        found[number] = Rank(number, worker, tops[0] if below else None)
    return found


def others(processes: list[Process], name: str) -> list[Process]:
    """The processes whose program is called `name`, such as `hydra_pmi_proxy`."""
    return [p for p in processes if Path(p.command.split()[0] if p.command else "").name == name]


def end_all(mark: str) -> None:
    """Kill whatever is left of a run, by pid, and wait until it is gone."""
    until_s = time.monotonic() + _END_LIMIT_S
    while (left := marked(mark)) and time.monotonic() < until_s:
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.02)
