"""Runs the parts of the GPU suite (`gpu_parts`): a process or an mpirun each, within its limit."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from mpipipe.bench.whole_run import WholeRun
from mpipipe.errors import EnvironmentSetupError, MpipipeError

__all__ = ["Part", "Result", "SuiteOptions", "mpirun_command", "run_part"]


# As pytest names them: beside others in workers, alone ("… FAILED"), and in its summary.
_FAILED_TEST = re.compile(
    r"(?m)(?<=FAILED )tests/\S+::\S+|(?<=ERROR )tests/\S+::\S+|^tests/\S+::\S+(?= (?:FAILED|ERROR))"
)
_TEST_COUNTS = re.compile(r"(?m)^=*\s*(\d+ (?:passed|failed|error).* in [\d.]+s.*?)\s*=*$")


@dataclass(frozen=True, slots=True)
class SuiteOptions:
    """What all parts share."""

    root: Path  # of the source tree whose mpipipe is measured
    out: Path  # where results go
    scratch: Path  # where runs, prompts, compiled kernels and a model go
    device: str = "cuda"  # of transformers; cpu to try the suite
    quick: bool = False  # tiny works, to try the suite
    profile: str = ""  # a shape: profile its first pipeline work
    overrides: tuple[str, ...] = ()  # section.key=value for every run
    num_gpus: int = 2  # parts that need more are left out
    disk: Path | None = None  # a folder on a disk, for the part that reads weights from one


@dataclass(frozen=True)
class Part:
    """One thing to run."""

    name: str
    command: list[str]
    limit_s: float
    json_path: Path | None = None  # where the records appear, one by one; None: on standard output
    labels: dict[str, Any] = field(default_factory=dict)  # added to each record
    whole_run: WholeRun | None = None  # the record is made of what it left
    about_s: float = 60.0  # it is expected to take
    environ: Mapping[str, str] = field(default_factory=dict)  # beside what is there
    before: Callable[[], object] | None = None  # called first, its time is no part of the part's
    has_tests: bool = False  # pytest's, with their names


@dataclass
class Result:
    """What became of a part."""

    part: Part
    seconds: float
    problem: str  # "" when all went well
    records: list[dict[str, Any]]
    last_lines: list[str]
    failed_tests: tuple[str, ...] = ()
    test_counts: tuple[str, ...] = ()  # pytest's last lines


def mpirun_command(num_ranks: int) -> list[str]:
    """The launcher with what it needs here."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    found = shutil.which("mpirun", path=beside) or shutil.which("mpiexec", path=beside)
    if found is None:
        raise EnvironmentSetupError("there is no mpirun: install an MPI, or mpipipe[mpich]")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    command = [found, "-n", str(num_ranks)]
    if "Open MPI" in version.stdout or "OpenRTE" in version.stdout:
        # Bound to one core each, as Open MPI does for two ranks, launching and polling would fight.
        command += ["--bind-to", "none", "--oversubscribe"]
        command += ["--allow-run-as-root"] if os.getuid() == 0 else []
    return command


def run_part(part: Part, root: Path, limit_s: float, log: TextIO) -> Result:
    """Run one part, at most `limit_s`; its output goes to the log."""
    if part.json_path is not None:
        part.json_path.unlink(missing_ok=True)
    output, problem, seconds = "", "", 0.0
    records: list[dict[str, Any]] = []
    try:
        if part.before is not None:
            part.before()
        if part.whole_run is None:
            output, problem, seconds = _ran(part, part.environ, root, limit_s, log)
            records = _records_of(part, output)
        else:
            part.whole_run.prepare()
            if part.whole_run.kernels:
                _read_libraries(root, limit_s)
            environ = part.whole_run.environ
            output, problem, seconds = _ran(part, environ, root, limit_s, log)
            if not problem:
                record = part.whole_run.record(seconds)
                records = [{"part": part.name, **part.labels, **record}]
    except MpipipeError as error:
        problem = str(error)
    except (KeyError, TypeError, OSError) as error:
        # Such as files of another tree that lack what this one reads.
        problem = f"not measured, {type(error).__name__}: {error}"
    finally:
        if part.whole_run is not None and not records:
            part.whole_run.failed()
    shown = [line for line in output.splitlines() if not line.startswith("{")]
    result = Result(part, seconds, problem, records, shown[-25:])
    if part.has_tests:
        result.failed_tests = tuple(dict.fromkeys(_FAILED_TEST.findall(output)))
        result.test_counts = tuple(_TEST_COUNTS.findall(output))
    return result


def _read_libraries(root: Path, limit_s: float) -> None:
    """Have a start find its libraries in memory: it is the kernels that are cold or warm.

    The first start on a machine would read some gigabytes of them from disk.
    """
    log = subprocess.DEVNULL  # the start that follows says what is missing
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, "-c", "import torch, transformers"],
            cwd=root,
            env=_environ(root),
            stdout=log,
            stderr=log,
            timeout=limit_s,
            check=False,
        )


def _ran(
    part: Part, environ: Mapping[str, str], root: Path, limit_s: float, log: TextIO
) -> tuple[str, str, float]:
    """The part's output, what went wrong, and its seconds."""
    log.write(f"\n==== {part.name}: {' '.join(part.command)}\n")
    log.flush()
    started_s = time.monotonic()
    process = subprocess.Popen(
        part.command,
        cwd=root,
        env={**_environ(root), **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",  # a rank that is killed may leave half a character
        start_new_session=True,
    )
    problem = ""
    try:
        output, _ = process.communicate(timeout=limit_s)
        if process.returncode:
            problem = f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        problem = f"stopped after {limit_s:.0f} s"
        output = _end(process)
    except BaseException:
        _end(process)  # no interrupt of ours reaches a session of its own
        raise
    seconds = time.monotonic() - started_s
    log.write(output)
    log.flush()
    return output, problem, seconds


def _environ(root: Path) -> dict[str, str]:
    """Of everything that is started: mpipipe is that of the tree to measure."""
    python_path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path}
    return {**os.environ, **own}


def _end(process: subprocess.Popen[str]) -> str:
    """Stop a process that takes too long, ranks included; returns what it had said."""
    for sent, wait_s in ((signal.SIGTERM, 8.0), (signal.SIGKILL, 8.0)):
        try:
            os.killpg(process.pid, sent)
            return process.communicate(timeout=wait_s)[0]
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    return ""


def _records_of(part: Part, output: str) -> list[dict[str, Any]]:
    """The JSON records that a part left, also one that failed halfway.

    What tests print may be JSON too (a line of a log), and is no record.
    """
    lines = output.splitlines() if part.labels else []
    if part.json_path is not None:
        found_file = part.json_path.is_file()
        lines = part.json_path.read_text("utf-8", "replace").splitlines() if found_file else []
        part.json_path.unlink(missing_ok=True)
    found = []
    for line in lines:
        if line.startswith("{"):
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a line cut off when the part was stopped
            if "work" in record:
                found.append({"part": part.name, **part.labels, **record})
    return found
