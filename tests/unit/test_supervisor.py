"""A supervisor and a rank as real processes; the rank does nothing else than what a test wants."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from mpipipe.errors import EXIT_INTERRUPTED, EXIT_PEER_LOST, EXIT_REQUEUE

ROOT = Path(__file__).parents[2]
LIMIT_S = 60

# The rank says its process id, and ends when its switch is tripped.
PROGRAM = """
import os, sys, time
from pathlib import Path
from mpipipe.job.supervision import RankPhase, open_rank_page
from mpipipe.runtime.stop_switch import StopSwitch, stop_signals
from mpipipe.job.supervisor import end_with, supervise, watch_supervisor
from mpipipe.topology.launcher import Launcher, LaunchInfo

stop, page = StopSwitch(), open_rank_page()
page.silence_limit_s = 2.0
supervisor = supervise(LaunchInfo(Launcher.SRUN, rank=1), page)
watch = watch_supervisor(supervisor, page, stop)
with stop_signals(stop, watch):
    page.opened(Path(sys.argv[1]), 1)
    page.phase, page.step = RankPhase.RUNNING, 17
    print(os.getpid(), flush=True)
    while not stop.reason:
        time.sleep(0.01)
page.ended(stop.exit_code)
end_with(supervisor)
if "lingers" in sys.argv:
    print("lingers", flush=True)
    time.sleep(600)
sys.exit(stop.exit_code)
"""


class Supervised:
    """The two processes of a rank."""

    def __init__(self, process: subprocess.Popen[str], rank: int) -> None:
        self.process = process
        self.rank = rank

    def end(self) -> tuple[int, str]:
        """The supervisor's exit code, and what was said; the rank is gone by then."""
        _, err = self.process.communicate(timeout=LIMIT_S)
        until_s = time.monotonic() + LIMIT_S
        while is_alive(self.rank):
            assert time.monotonic() < until_s, "the rank lives on"
            time.sleep(0.01)
        return self.process.returncode, err


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in {"Z", "X"}


@contextmanager
def supervised(folder: Path, *before: str, after: Sequence[str] = ()) -> Iterator[Supervised]:
    (folder / "status.json").write_text('{"state": "generating"}')
    command = [*before, sys.executable, "-c", PROGRAM, str(folder), *after]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        rank = int(process.stdout.readline())
        try:
            yield Supervised(process, rank)
        finally:
            for pid in (process.pid, rank):
                if is_alive(pid):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, EXIT_REQUEUE),
        (signal.SIGUSR1, EXIT_REQUEUE),
        (signal.SIGUSR2, EXIT_REQUEUE),
        (signal.SIGHUP, EXIT_REQUEUE),
        (signal.SIGINT, EXIT_INTERRUPTED),
    ],
)
def test_a_signal_reaches_the_rank_and_its_code_comes_back(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    with supervised(tmp_path) as both:
        both.process.send_signal(number)
        assert both.end() == (code, "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_rank_that_is_killed_is_named(number: signal.Signals, tmp_path: Path) -> None:
    with supervised(tmp_path) as both:
        os.kill(both.rank, number)
        code, err = both.end()
    assert code == EXIT_PEER_LOST
    for part in ("rank 1 on ", "(stage 1), after step 17,", number.name):
        assert part in err
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["error"] in err


def test_a_stopped_rank_is_ended(tmp_path: Path) -> None:
    with supervised(tmp_path) as both:
        os.kill(both.rank, signal.SIGSTOP)
        code, err = both.end()
    assert code == EXIT_PEER_LOST
    assert "was stopped (SIGSTOP) for 5 s" in err


def test_a_supervisor_that_is_stopped_is_continued(tmp_path: Path) -> None:
    with supervised(tmp_path) as both:
        both.process.send_signal(signal.SIGSTOP)
        both.process.send_signal(signal.SIGTERM)
        assert both.end() == (EXIT_REQUEUE, "")


def test_a_rank_ends_without_its_supervisor(tmp_path: Path) -> None:
    with supervised(tmp_path) as both:
        both.process.kill()
        code, err = both.end()
    assert code == -signal.SIGKILL
    assert "which watched over the rank of stage 1, was killed" in err


def test_a_rank_ends_without_its_launcher(tmp_path: Path) -> None:
    launcher = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    with supervised(tmp_path, sys.executable, "-c", launcher) as both:
        both.process.kill()
        _, err = both.end()
    assert "its launcher, srun, is gone" in err


def test_a_rank_that_leaves_ends_with_a_supervisor_that_is_killed_meanwhile(tmp_path: Path) -> None:
    """No thread watches any more, and MPI's last words would wait for ever."""
    with supervised(tmp_path, after=["lingers"]) as rank:
        os.kill(rank.rank, signal.SIGTERM)
        assert rank.process.stdout is not None
        assert rank.process.stdout.readline() == "lingers\n"
        rank.process.kill()
        code, _ = rank.end()
    assert code == -signal.SIGKILL
