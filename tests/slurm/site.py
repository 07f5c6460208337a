"""What a user of the cluster has: two installations, models, a scratch folder, and sbatch.

Not here: which jobs are run, and what is asked of them. Invariant: the two installations share one
set of packages and differ in their MPI, so the same tokens are a statement about MPI and Slurm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.slurm.cluster import CLIENT_PAUSE_S, Cluster, until
from tests.slurm.network import HEAD

__all__ = ["ROOT", "JobEnd", "Site", "installations", "read_jsonl"]

ROOT = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
JOB_LIMIT_S = 600.0  # in the queue behind other stories, beside other suites
_OTHER = {"mpich": "openmpi", "openmpi": "mpich"}
_COMMAND = """\
#!{python}
import sys
from mpipipe.cli.main import main
sys.exit(main())
"""


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def installations(folder: Path) -> dict[str, Path]:
    """Virtual environments by MPI: the one of this Python, and a light one beside it.

    The light one has the other MPI's wheel and borrows all other packages. mpi4py looks for the
    library in the environment that it runs in, so each loads its own.
    """
    here = Path(sys.prefix)
    mine = next(mpi for mpi in _OTHER if _has(mpi))
    other = folder / _OTHER[mine]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(other)], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(other), "install", "-q", _OTHER[mine]],
        capture_output=True,
        timeout=120,
        check=True,
    )
    packages = Path("lib") / f"python{sys.version_info.major}.{sys.version_info.minor}"
    borrow = f"import site; site.addsitedir({str(here / packages / 'site-packages')!r})\n"
    (other / packages / "site-packages/borrowed.pth").write_text(borrow)
    command = other / "bin/mpipipe"
    command.write_text(_COMMAND.format(python=other / "bin/python"))
    command.chmod(0o755)
    return {mine: here, _OTHER[mine]: other}


def _has(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


@dataclass(frozen=True, slots=True)
class JobEnd:
    """What a job left behind."""

    job_id: str
    fields: dict[str, str]  # of `scontrol show job`
    log: str
    folder: Path  # of the job: config/, prompts/, outputs/
    observed: dict[str, Any] = field(default_factory=dict)  # what the scenario saw on the way

    @property
    def state(self) -> str:
        """Such as COMPLETED."""
        return self.fields["JobState"]

    def completions(self) -> list[dict[str, Any]]:
        """The lines of completions.jsonl."""
        return read_jsonl(self.folder / "outputs/completions.jsonl")

    def tokens(self) -> dict[str, list[int]]:
        """Token ids by prompt id."""
        return {record["id"]: record["token_ids"] for record in self.completions()}

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run folder."""
        document: dict[str, Any] = json.loads((self.folder / "outputs" / name).read_text())
        return document


class Site:
    """A user's account on the cluster."""

    def __init__(
        self, cluster: Cluster, environments: Mapping[str, Path], folder: Path, tiny: Path
    ) -> None:
        self.cluster = cluster
        self.environments = environments
        self.folder = folder
        self.tiny_config = tiny  # a job that lasts some seconds

    def environ(self, mpi: str, more: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
        """The login shell's environment of a user of `mpi`."""
        kept = ("HOME", "LANG", "MPIPIPE_CACHE", "PYTHONPATH", "XDG_CACHE_HOME")
        environ = {name: os.environ[name] for name in kept if name in os.environ}
        return environ | {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "SLURM_CONF": str(self.cluster.conf),
            "MPIPIPE_VENV": str(self.environments[mpi]),
            "MPIPIPE_SCRATCH": str(self.folder),
            "MPIPIPE_DOCTOR": "off",
            "OMP_NUM_THREADS": "1",
            **more,
        }

    def sbatch(
        self,
        mpi: str,
        config: Path | str,
        *words: str,
        options: tuple[str, ...] = (),
        env: Mapping[str, str] = MappingProxyType({}),
    ) -> str:
        """`sbatch launch/submit.sbatch CONFIG WORDS…` as the guide says; returns the job id."""
        result = self.cluster.on(
            HEAD, "sbatch", "--parsable", "--gres=none", f"--output={self.folder}/log-%A_%a.txt",
            *options, "launch/submit.sbatch", str(config), *words,
            env=self.environ(mpi, env), cwd=ROOT,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def srun(self, mpi: str, *words: str) -> subprocess.CompletedProcess[str]:
        """A step of two ranks on two nodes, from the login shell."""
        return self.cluster.on(
            HEAD, "srun", "--partition=short", "-N2", "-n2", "-c2", "--kill-on-bad-exit=1", *words,
            env=self.environ(mpi), cwd=ROOT,
        )  # fmt: skip

    def python(self, mpi: str) -> str:
        """The Python of an installation."""
        return str(self.environments[mpi] / "bin/python")

    def job_folder(self, job_id: str, config: Path | str) -> Path:
        """Where run.sh puts the job; `12_3` is task 3 of the array 12."""
        return self.folder / f"{Path(config).stem}-{job_id}"

    def finish(self, job_id: str, config: Path | str, **observed: Any) -> JobEnd:
        """Wait for the end of the job for good, and collect it."""
        try:
            fields = self.cluster.wait_for_state(job_id, *ENDED, limit_s=JOB_LIMIT_S)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.log(job_id)}") from None
        folder = self.job_folder(job_id, config)
        return JobEnd(job_id, fields, self.log(job_id), folder, observed)

    def log(self, job_id: str) -> str:
        """What the job's batch script and its steps printed."""
        array, _, task = job_id.partition("_")
        path = self.folder / f"log-{array}_{task or 4294967294}.txt"  # %a without an array
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for_completions(self, folder: Path, number: int, job_id: str) -> None:
        """Until the job has written `number` completions.

        Raises:
            AssertionError: the job ended before.
        """

        def enough() -> bool:
            # The state is asked first: a job may write its last lines and end meanwhile.
            ended = self.cluster.job(job_id)["JobState"] in ENDED
            lines = sum(
                path.read_bytes().count(b"\n")
                for path in (folder / "outputs").glob("completions_rank_*.jsonl")
            )
            if lines < number and ended:
                raise AssertionError(f"job {job_id} ended early:\n{self.log(job_id)}")
            return lines >= number

        try:
            until(enough, f"{number} completions in {folder}", JOB_LIMIT_S, CLIENT_PAUSE_S)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.log(job_id)}") from None

    def until(self, done: Callable[[], bool], what: str, limit_s: float = 120) -> float:
        """Wait; returns the seconds it took."""
        begin = time.monotonic()
        until(done, what, limit_s, CLIENT_PAUSE_S)
        return time.monotonic() - begin
