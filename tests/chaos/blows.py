"""What is done to a run, where and when; and which ends are documented for it.

| blow | on | exit codes | why |
|---|---|---|---|
| `kill` | a worker | 6 | the rank is lost |
| `kill-supervisor` | the process over a worker | 6, 9, 137 | its launcher sees a killed process |
| `kill-proxy` | `hydra_pmi_proxy` | any but 0 | the launcher's own, MPICH's choice |
| `kill-launcher` | mpiexec | -9 (137 in a shell) | the launcher's own; the ranks notice |
| `kill-everything` | all at once | -9 | a node without power |
| `freeze` | a worker, or its supervisor, too | 6 | its heartbeats stop |
| `pause` | as `freeze`, for a while shorter than the deadline | 0 | nothing is wrong |
| `stop-launcher` | TERM or USR1; USR2 ends MPICH's mpiexec itself | 75 | told to stop |
| `stop-rank` | TERM, USR1 or USR2 | 75 | told to stop |
| `interrupt-launcher`, `interrupt-rank`, `ctrl-c` | INT; `ctrl-c` to the process group | 130 | |

A blow that comes when all is done ends with 0.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from random import Random

from mpipipe.errors import EXIT_ENVIRONMENT, EXIT_INTERRUPTED, EXIT_PEER_LOST, EXIT_REQUEUE
from tests.chaos.judge import Expected
from tests.chaos.processes import Process, Rank, marked, others, ranks

__all__ = ["BLOWS", "MOMENTS", "Blow", "Dealt", "deal", "draw", "expected"]

_KILLED = -signal.SIGKILL
_ANY_FAILURE = frozenset({*range(-64, 0), *range(1, 256)})
_EXIT_CODES = {
    "kill": frozenset({EXIT_PEER_LOST}),
    "kill-supervisor": frozenset({EXIT_PEER_LOST, signal.SIGKILL, 128 + signal.SIGKILL}),
    "kill-proxy": _ANY_FAILURE,
    "kill-launcher": frozenset({_KILLED}),
    "kill-everything": frozenset({_KILLED}),
    "freeze": frozenset({EXIT_PEER_LOST}),
    "pause": frozenset[int](),
    "stop-launcher": frozenset({EXIT_REQUEUE}),
    "stop-rank": frozenset({EXIT_REQUEUE}),
    "interrupt-launcher": frozenset({EXIT_INTERRUPTED}),
    "interrupt-rank": frozenset({EXIT_INTERRUPTED}),
    "ctrl-c": frozenset({EXIT_INTERRUPTED}),
}
BLOWS = tuple(_EXIT_CODES)
# Python itself starts: a signal ends it, and nothing has begun. On two busy cores 0.2 s and more.
# A rank that is killed or frozen then has no supervisor yet: the launcher's own code, or that of an
# MPI_Init that does not come back.
_HARDLY_BEGUN_S = 1.0
MOMENTS = ("boot", "loading", "generating", "generating", "generating", "merging")
_SIGNALS = {
    "stop-launcher": (signal.SIGTERM, signal.SIGUSR1),
    "stop-rank": (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2),
    "freeze": (signal.SIGSTOP,),
    "pause": (signal.SIGSTOP,),
    "interrupt-launcher": (signal.SIGINT,),
    "interrupt-rank": (signal.SIGINT,),
    "ctrl-c": (signal.SIGINT,),
}


@dataclass(frozen=True, slots=True)
class Blow:
    """What shall happen to a run: drawn beforehand, so that a seed gives the same blows."""

    kind: str  # one of BLOWS
    rank: int
    signal: int
    moment: str  # "boot" | "loading" | "generating" | "merging"
    progress: float  # of what is left to generate, 0 to 1
    delay_s: float  # after the moment is there; of "boot" since the start
    pause_s: float
    whole_rank: bool  # the supervisor, too


@dataclass(frozen=True, slots=True)
class Dealt:
    """What was done, and to whom."""

    target: str
    pids: tuple[int, ...]


def draw(rng: Random, kind: str, num_ranks: int, deadline_s: float) -> Blow:
    """A blow of that kind at a random moment."""
    moment = rng.choice(MOMENTS)
    return Blow(
        kind=kind,
        rank=rng.randrange(num_ranks),
        signal=rng.choice(_SIGNALS.get(kind, (signal.SIGKILL,))),
        moment=moment,
        progress=rng.random(),
        delay_s=rng.uniform(0.2, 4.0) if moment == "boot" else rng.uniform(0.0, 0.3),
        pause_s=rng.uniform(0.3, 0.5) * deadline_s,  # as much is left for a busy machine
        whole_rank=rng.random() < 0.5,
    )


def expected(blow: Blow, limit_s: float) -> Expected:
    """Which ends are right, within `limit_s` seconds of the blow."""
    codes = _EXIT_CODES[blow.kind]
    is_told = blow.kind.startswith(("stop", "interrupt"))
    if is_told and blow.moment == "boot" and blow.delay_s < _HARDLY_BEGUN_S:
        codes |= {blow.signal, 128 + blow.signal}
    if blow.kind in {"kill", "freeze"} and blow.moment == "boot" and blow.delay_s < _HARDLY_BEGUN_S:
        codes |= {signal.SIGKILL, 128 + signal.SIGKILL, EXIT_ENVIRONMENT}
    return Expected(codes, limit_s)


def deal(blow: Blow, mark: str, launcher: int) -> Dealt | None:
    """Do it; None: whom it was meant for is not there (yet, or any more).

    A pause takes as long as it is meant to take.
    """
    processes = marked(mark)
    targets = _targets(blow, processes, launcher)
    if not targets:
        return None
    if blow.kind == "ctrl-c":
        os.killpg(launcher, blow.signal)
    else:
        for process in targets:
            _send(process.pid, blow.signal)
    if blow.kind == "pause":
        time.sleep(blow.pause_s)
        for process in targets:
            _send(process.pid, signal.SIGCONT)
    name = signal.Signals(blow.signal).name
    return Dealt(f"{name} → {_name(blow, targets)}", tuple(process.pid for process in targets))


def _targets(blow: Blow, processes: list[Process], launcher: int) -> list[Process]:
    of_launcher = [process for process in processes if process.pid == launcher]
    if blow.kind in ("kill-launcher", "stop-launcher", "interrupt-launcher", "ctrl-c"):
        return of_launcher
    if blow.kind == "kill-everything":
        return processes
    if blow.kind == "kill-proxy":
        return others(processes, "hydra_pmi_proxy")[:1]
    rank = ranks(processes).get(blow.rank)
    return [] if rank is None else _of_rank(blow, rank)


def _of_rank(blow: Blow, rank: Rank) -> list[Process]:
    if blow.kind == "kill-supervisor":
        return [rank.supervisor or rank.worker]
    if blow.kind in ("freeze", "pause") and blow.whole_rank and rank.supervisor is not None:
        return [rank.supervisor, rank.worker]
    if blow.kind in ("stop-rank", "interrupt-rank") and blow.whole_rank and rank.supervisor:
        return [rank.supervisor]
    return [rank.worker]


def _name(blow: Blow, targets: list[Process]) -> str:
    if blow.kind == "ctrl-c":
        return "process group"
    if blow.kind == "kill-everything":
        return f"{len(targets)} processes"
    return " + ".join(f"{process.pid}" for process in targets)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it was quicker
        os.kill(pid, number)
