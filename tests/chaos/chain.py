"""One chain: the same command again and again, with a blow each time, until all is done."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.chaos.blows import Blow, deal, expected
from tests.chaos.judge import End, completions_faults, end_faults, num_records
from tests.chaos.processes import MARK, end_all, marked

__all__ = ["Job", "Point", "attempt", "final_faults", "reference"]

ROOT = Path(__file__).parents[2]
_RUN_LIMIT_S = 300.0  # of a run that nothing is done to, on a busy machine of two cores
_POLL_S = 0.02
_MAX_OUTPUT = 20_000  # characters
_UNENDED = {"booting", "loading", "generating", "stopping"}
_SLACK_OF_A_START = 3.0  # pipeline.heartbeat_timeout_s is so much longer while ranks load


@dataclass(frozen=True, slots=True)
class Job:
    """What is run, and how long its parts may take."""

    config: Path
    names: Sequence[str]  # ids of the prompts
    words: Sequence[str] = ()
    deadline_s: float = 10.0  # a rank that says nothing for so long is lost
    start_deadline_s: float = 30.0  # the same until all ranks have met
    # What an end may take beyond these: with it less than the slack of a start, which must be off.
    spare_s: float = 18.0

    def limit_s(self, blow: Blow) -> float:
        """From the blow to the end of the last process."""
        if blow.kind == "pause":
            return _RUN_LIMIT_S  # it goes on
        silence_s = self.deadline_s
        if blow.moment in ("boot", "loading"):
            silence_s *= _SLACK_OF_A_START
        if blow.moment == "boot":  # before the ranks have met there is the limit of MPI's start
            silence_s = max(silence_s, self.start_deadline_s)
        return silence_s + self.spare_s


@dataclass(frozen=True, slots=True)
class Point:
    """One run and what was done to it."""

    chain: int
    num_ranks: int
    blow: Blow | None  # None: it was left alone
    dealt: str  # what was done, to whom; "" when it had ended before
    moment_s: float  # of the blow, since the start
    end: End
    num_done: int  # prompts with a record, afterwards
    faults: Sequence[str] = field(default_factory=tuple)

    @staticmethod
    def of_files(chain: int, num_ranks: int, fault: str) -> Point:
        """A fault of a finished chain's files."""
        return Point(chain, num_ranks, None, "", 0.0, End(0, 0.0), 0, (fault,))

    def document(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    def line(self) -> str:
        """As a row of the table."""
        blow = self.blow
        what = (
            f"{blow.kind:18} rank {blow.rank} {blow.moment:10}" if blow else f"{'(left alone)':36}"
        )
        code = "hangs" if self.end.exit_code is None else f"{self.end.exit_code:5}"
        return (
            f"{self.chain:3} {self.num_ranks} ranks  {what} {self.moment_s:5.1f} s {self.dealt:26} "
            f"exit {code} after {self.end.seconds:5.1f} s  {self.num_done:4} done"
            + "".join(f"\n      VIOLATION {fault}" for fault in self.faults)
        )


def attempt(job: Job, folder: Path, chain: int, num_ranks: int, blow: Blow | None) -> Point:
    """Run the command once in `folder`, going on with what is there, and deal the blow."""
    mark = uuid.uuid4().hex
    outputs = folder.parent / f"{folder.name}.outputs"
    outputs.mkdir(exist_ok=True)
    number = len(list(outputs.iterdir())) + 1
    output = outputs / f"{number}.txt"
    # Of a chain every second attempt shares its prompts out to two replicas, also unequal ones.
    replicas = 2 if number % 2 == 0 and num_ranks > 1 else 1
    started, began_s = time.time(), time.monotonic()
    with output.open("w+b") as said:
        process = _start(job, folder, num_ranks, mark, said, f"pipeline.replicas={replicas}")
        try:
            dealt = None
            if blow is not None and _await_moment(job, folder, blow, process, started):
                dealt = deal(blow, mark, process.pid)
            dealt_s = time.monotonic()
            limit_s = _RUN_LIMIT_S if blow is None or dealt is None else job.limit_s(blow)
            end = _end(process, mark, dealt_s, limit_s)
        finally:
            end_all(mark)
            process.wait()
        said.seek(0)
        text = said.read().decode("utf-8", "replace")[-_MAX_OUTPUT:]
    end = End(end.exit_code, end.seconds, end.left, text)
    faults = _faults(job, folder, blow if dealt else None, end, started)
    return Point(
        chain,
        num_ranks,
        blow,
        dealt.target if dealt else "",
        dealt_s - began_s,
        end,
        _num_done(folder),
        faults,
    )


def _start(
    job: Job, folder: Path, num_ranks: int, mark: str, said: IO[bytes], word: str
) -> subprocess.Popen[bytes]:
    words = [f"output.dir={folder}", "output.resume=true", word, *job.words]
    words.append(f"pipeline.handshake_timeout_s={job.start_deadline_s}")
    words.append(f"pipeline.heartbeat_timeout_s={job.deadline_s}")
    command = [sys.executable, "-m", "mpipipe", "run", str(job.config), *words]
    return subprocess.Popen(
        [*_launcher(num_ranks), *command] if num_ranks else command,
        cwd=ROOT,
        env={**os.environ, **_environment(job), MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _launcher(num_ranks: int) -> list[str]:
    beside = Path(sys.executable).parent
    found = shutil.which("mpiexec", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    assert found is not None, "no mpiexec: install mpipipe[mpich]"
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    is_open_mpi = "Open MPI" in version.stdout or "OpenRTE" in version.stdout
    return [
        found,
        *(["--oversubscribe", "--allow-run-as-root"] if is_open_mpi else []),
        "-n",
        str(num_ranks),
    ]


def _environment(job: Job) -> Mapping[str, str]:
    return {"OMP_NUM_THREADS": "1", "MPIPIPE_INIT_TIMEOUT_S": str(job.start_deadline_s)}


def _await_moment(
    job: Job, folder: Path, blow: Blow, process: subprocess.Popen[bytes], started: float
) -> bool:
    """Wait for the moment; False: the run has ended before."""
    total, before = len(job.names), _num_lines(folder)
    wanted = before + 1 + int(blow.progress * (total - before - 1))
    until_s = time.monotonic() + _RUN_LIMIT_S

    def is_there() -> bool:
        match blow.moment:
            case "boot":
                return True
            case "loading":
                return _state(folder, started) in ("loading", "generating")
            case "generating":
                return _num_lines(folder) >= wanted
            case _:
                return _num_lines(folder) >= total

    while not is_there():
        if process.poll() is not None or time.monotonic() > until_s:
            return False
        time.sleep(_POLL_S)
    time.sleep(blow.delay_s if blow.moment != "merging" else blow.delay_s / 10)
    return process.poll() is None


def _end(process: subprocess.Popen[bytes], mark: str, since_s: float, limit_s: float) -> End:
    """Wait until the launcher and all that it started have ended, or for `limit_s`."""
    while (process.poll() is None or marked(mark)) and time.monotonic() - since_s < limit_s:
        time.sleep(_POLL_S)
    seconds = time.monotonic() - since_s
    return End(process.poll(), seconds, [left.label for left in marked(mark)])


def _faults(job: Job, folder: Path, blow: Blow | None, end: End, started: float) -> tuple[str, ...]:
    path = folder / "completions.jsonl"
    is_complete = path.exists() and path.read_bytes().count(b"\n") == len(job.names)
    if blow is None:
        faults = [] if end.exit_code == 0 else [f"left alone, it ended with {end.exit_code}"]
        return tuple(faults)
    faults = end_faults(end, expected(blow, job.limit_s(blow)), is_complete=is_complete)
    told = end.exit_code is not None and "kill" not in blow.kind
    state = _state(folder, started)
    if told and blow.kind not in ("freeze", "pause") and state in _UNENDED:
        faults.append(f"status.json says {state} after the end")
    return tuple(faults)


def final_faults(job: Job, folder: Path, right: Mapping[str, Sequence[int]]) -> list[str]:
    """What is wrong with the files of a finished chain."""
    path = folder / "completions.jsonl"
    faults = completions_faults(path.read_bytes() if path.exists() else b"", right)
    state = _state(folder, 0.0)
    if state != "done":
        faults.append(f"status.json says {state} when all is done")
    return faults


def reference(job: Job, folder: Path) -> dict[str, list[int]]:
    """The tokens of each prompt, from one rank that nothing is done to."""
    point = attempt(job, folder, 0, 0, None)
    if point.end.exit_code != 0:
        raise RuntimeError(f"the undisturbed run failed: {point.end.output}")
    lines = (folder / "completions.jsonl").read_bytes().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["id"]: record["token_ids"] for record in records}


def _num_done(folder: Path) -> int:
    parts = [path.read_bytes() for path in sorted(folder.glob("completions_rank_*.jsonl"))]
    return num_records(b"\n".join(parts))


def _num_lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("completions_rank_*.jsonl"))


def _state(folder: Path, started: float) -> str | None:
    """What `status.json` says, if it was written since `started` (Unix time)."""
    path = folder / "status.json"
    with contextlib.suppress(OSError, ValueError):
        if path.stat().st_mtime >= started:
            return str(json.loads(path.read_text(encoding="utf-8")).get("state"))
    return None
