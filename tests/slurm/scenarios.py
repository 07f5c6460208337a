"""What happens to jobs on the cluster: each function drives one story and says how it ended.

Not here: what must hold (the tests). The stories run side by side in threads, because most of each
is waiting; Slurm itself sees to it that a node runs one job at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.slurm import held
from tests.slurm.apptainer import install_apptainer
from tests.slurm.image import borrowed_packages, build_image
from tests.slurm.network import HEAD
from tests.slurm.site import ENDED, JOB_LIMIT_S, ROOT, JobEnd, Site, read_jsonl

__all__ = [
    "ARRAY_PROMPTS",
    "DEMO",
    "DEMO_WORDS",
    "SEEN",
    "TINY_PROMPTS",
    "MpiMismatch",
    "admin_requeue",
    "array",
    "cyclic",
    "demo_alone",
    "demo_in_image",
    "demo_on_two_nodes",
    "dense_memory",
    "doctor_on_two_nodes",
    "experiment",
    "held_in_the_queue",
    "near_its_wall_time",
    "node_loses_power",
    "rank_killed",
    "rank_killed_under_plain_srun",
    "tiny_alone",
    "told_to_stop",
    "wrong_mpi",
]

DEMO = "configs/demo.toml"
# Every node sees all cores of the machine, and there are few: more threads only get in their way.
DEMO_WORDS = ("generation.max_new_tokens=24", "pipeline.threads_per_rank=1")
TINY_PROMPTS = 20  # of 48 tokens
ARRAY_PROMPTS = 10
SEEN = 3  # completions before something happens to a job, which is held from then on
EXPERIMENT_LIMIT_S = 900.0  # four tasks of two launches each, beside other jobs
# MPICH finds the shared memory of the machine across the nodes' namespaces, unless told otherwise.
FORCED_NETWORK = {"UCX_TLS": "tcp,self"}


def _alone(site: Site, config: Path | str, name: str, *words: str) -> dict[str, list[int]]:
    folder = site.folder / name
    command = [sys.executable, "-m", "mpipipe", "run", str(config), f"output.dir={folder}", *words]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return {line["id"]: line["token_ids"] for line in read_jsonl(folder / "completions.jsonl")}


def _held(site: Site, gate: Path | None = None) -> Mapping[str, str]:
    """The environment of a job that cannot end before it is touched.

    Nor can it go on, after a requeue, before `_first_attempt` has opened the gate.
    """
    return held.environ(site.folder / "held", SEEN, gate)


def _first_attempt(site: Site, job: str, folder: Path, gate: Path) -> list[dict[str, object]]:
    """What the first attempt left, when it is over; then the next one may begin."""

    def is_over() -> bool:
        fields = site.cluster.job(job)  # it may run again already, and waits at the gate
        return fields["JobState"] != "RUNNING" or fields["Restarts"] != "0"

    site.until(is_over, "the first attempt to end")
    first = _attempt(folder)
    gate.touch()
    return first


def demo_alone(site: Site) -> dict[str, list[int]]:
    """The demo's tokens from one process, without Slurm and MPI."""
    return _alone(site, DEMO, "demo-alone", *DEMO_WORDS)


def tiny_alone(site: Site) -> dict[str, list[int]]:
    """The tiny model's tokens from one process."""
    return _alone(site, site.tiny_config, "tiny-alone")


def demo_on_two_nodes(site: Site, mpi: str) -> JobEnd:
    """As the guide has it; the bytes between the nodes are counted."""
    doctor = "full" if mpi == "mpich" else "off"
    gate = site.folder / f"gate-demo-{mpi}"
    environ = {
        "MPIPIPE_DOCTOR": doctor, **FORCED_NETWORK, **held.behind(site.folder / "held", gate)
    }  # fmt: skip
    job = site.sbatch(mpi, DEMO, *DEMO_WORDS, env=environ)
    site.cluster.wait_for_state(job, "RUNNING", "COMPLETED", "FAILED", limit_s=JOB_LIMIT_S)
    before = site.cluster.network.bytes_sent("n1")
    gate.touch()  # nothing is sent before, however late its start was seen
    end = site.finish(job, DEMO)
    end.observed["bytes"] = site.cluster.network.bytes_sent("n1") - before
    return end


def demo_in_image(site: Site) -> JobEnd:
    """The demo in a container on both nodes, under a user whose PYTHONPATH holds a broken torch."""
    stray = site.folder / "stray"
    (stray / "torch").mkdir(parents=True)
    (stray / "torch/__init__.py").write_text("raise ImportError('the stray torch')\n")
    folder = site.folder / "image"
    folder.mkdir()
    environ = {
        "MPIPIPE_IMAGE": str(build_image(folder)),
        "MPIPIPE_APPTAINER": install_apptainer(),
        "MPIPIPE_BINDS": f"{borrowed_packages()}:{borrowed_packages()}:ro",
        "APPTAINER_DROP_CAPS": "CAP_SYS_RESOURCE",  # root in a container may not have it to give
        "MPIPIPE_DOCTOR": "quick",
        "PYTHONPATH": str(stray),
        **FORCED_NETWORK,
    }
    options = ("--partition=short",)
    job = site.sbatch("mpich", DEMO, *DEMO_WORDS, options=options, env=environ)
    return site.finish(job, DEMO)


def told_to_stop(site: Site) -> JobEnd:
    """The batch script gets USR1, as --signal=B:USR1@120 sends it; then the job goes on."""
    config = site.tiny_config
    gate = site.folder / "gate-told"
    job = site.sbatch("mpich", config, env=_held(site, gate))
    folder = site.job_folder(job, config)
    site.wait_for_completions(folder, SEEN, job)
    while_running = login_node(site, "status", job, "--json")
    site.cluster.ask("scancel", "--batch", "--signal=USR1", job)
    first = _first_attempt(site, job, folder, gate)
    end = site.finish(job, config, first=first, while_running=while_running.stdout)
    end.observed["after"] = login_node(site, "status", str(end.folder)).stdout
    return end


def held_in_the_queue(site: Site) -> subprocess.CompletedProcess[str]:
    """What `mpipipe status JOB` says of a job that waits."""
    job = site.sbatch("mpich", site.tiny_config, options=("--hold",))
    said = login_node(site, "status", job)
    site.cluster.ask("scancel", job)
    return said


def admin_requeue(site: Site) -> JobEnd:
    """`scontrol requeue`, which is what a preemption does: TERM, KillWait, KILL."""
    config = site.tiny_config
    gate = site.folder / "gate-requeue"
    job = site.sbatch("openmpi", config, env=_held(site, gate))
    folder = site.job_folder(job, config)
    site.wait_for_completions(folder, SEEN, job)
    site.cluster.ask("scontrol", "requeue", job)
    return site.finish(job, config, first=_first_attempt(site, job, folder, gate))


def node_loses_power(site: Site) -> JobEnd:
    """The second node of a job falls silent; Slurm starts the job again on the others."""
    config = site.tiny_config
    gate = site.folder / "gate-power"
    environ = {**FORCED_NETWORK, **_held(site, gate)}
    job = site.sbatch("mpich", config, options=("--partition=fragile",), env=environ)
    folder = site.job_folder(job, config)
    site.wait_for_completions(folder, SEEN, job)
    nodes = site.cluster.ask("scontrol", "show", "hostnames", site.cluster.job(job)["NodeList"])
    victim = nodes.split()[1]
    site.cluster.network.cut_power(victim)
    first = _first_attempt(site, job, folder, gate)
    return site.finish(job, config, first=first, victim=victim)


def _attempt(folder: Path) -> list[dict[str, object]]:
    """What the first attempt left: complete lines only, a torn last one is dropped."""
    lines: list[dict[str, object]] = []
    for path in sorted((folder / "outputs").glob("completions_rank_*.jsonl")):
        whole = path.read_text().rpartition("\n")[0]
        path.with_suffix(".seen").write_text(whole + "\n")
        lines += read_jsonl(path.with_suffix(".seen"))
        path.with_suffix(".seen").unlink()
    return lines


def rank_killed(site: Site) -> JobEnd:
    """One rank is killed from outside, as the kernel does when memory is short.

    Another job is then given the folder of the failed one.
    """
    config = site.tiny_config
    # So long a silence cannot have been what ended the job so soon.
    job = site.sbatch("openmpi", config, "pipeline.heartbeat_timeout_s=600", env=_held(site))
    folder = site.job_folder(job, config)
    site.wait_for_completions(folder, SEEN, job)
    ranks = _ranks(site, "n2")
    os.kill(ranks[0], signal.SIGKILL)
    took = site.until(lambda: site.cluster.job(job)["JobState"] != "RUNNING", "the job to end")
    end = site.finish(job, config, took_s=took, ranks=ranks, first=_attempt(folder))
    again = site.sbatch("mpich", str(folder), options=("--partition=short",))
    other = site.finish(again, folder, first=end.observed["first"])
    end.observed["continued"] = dataclasses.replace(other, folder=folder)
    return end


def _ranks(site: Site, node: str) -> list[int]:
    """The ranks on `node`; not their supervisors, which are their parents."""
    parents: dict[int, int] = {}
    for process in site.cluster.network.processes(node):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if b"mpipipe\0run" in Path(f"/proc/{process}/cmdline").read_bytes():
                status = Path(f"/proc/{process}/stat").read_text()
                parents[process] = int(status.rpartition(")")[2].split()[1])
    return [process for process in parents if process not in parents.values()]


def near_its_wall_time(site: Site) -> str:
    """A job of two minutes that has work for longer; what it printed when Slurm had told it.

    It sleeps most of its time, which a minute of computing would take from the other suites.

    Slurm looks every 30 s, so USR1 comes 60 to 90 s before the end: 30 s or more after the start.
    """
    config = site.tiny_config
    many = site.folder / "many.jsonl"
    many.write_text(
        "".join(json.dumps({"id": f"m{i}", "prompt": "on"}) + "\n" for i in range(9999))
    )
    options = ("--partition=short", "--nodes=1", "--time=2", "--signal=B:USR1@60")
    job = site.sbatch("mpich", config, f"prompts.path={many}", options=options, env=_held(site))
    site.until(
        lambda: site.cluster.job(job)["JobState"] == "RUNNING", "the job to start", JOB_LIMIT_S
    )
    site.until(lambda: "goes back into the queue" in site.log(job), "the job to stop", 300)
    site.cluster.ask("scancel", job)
    return site.log(job)


def array(site: Site) -> list[JobEnd]:
    """Two tasks, a node each. One is told to stop, and goes on: the one whose id is the array's."""
    config = site.tiny_config
    options = ("--array=0-1", "--nodes=1")
    words = (f"prompts.limit={ARRAY_PROMPTS}", "generation.seed=%a")
    job = site.sbatch("mpich", config, *words, options=options, env=_held(site))
    tasks = [f"{job}_{task}" for task in range(2)]
    for task in tasks:
        site.wait_for_completions(site.job_folder(task, config), SEEN, task)
    (chosen,) = (task for task in tasks if site.cluster.job(task)["JobId"] == job)
    site.cluster.ask("scancel", "--batch", "--signal=USR1", chosen)
    return [site.finish(task, config, told=task == chosen) for task in tasks]


def cyclic(site: Site) -> JobEnd:
    """Four ranks dealt round two nodes: 0 and 2 on the first, 1 and 3 on the second."""
    config, folder = site.tiny_config, site.folder / "cyclic"
    command = (f"{site.environments['mpich']}/bin/mpipipe", "run", str(config))
    words = ("prompts.limit=3", f"output.dir={folder / 'outputs'}")
    flags = ("-n4", "-c1", "--distribution=cyclic", "--mpi=pmi2")
    result = site.srun("mpich", *flags, *command, *words)
    assert result.returncode == 0, result.stderr
    return JobEnd("", {}, result.stderr + result.stdout, folder)


@dataclass(frozen=True, slots=True)
class MpiMismatch:
    """How a launch with the wrong --mpi= ended."""

    exit_code: int
    said: str


def wrong_mpi(site: Site, mpi: str, flag: str) -> MpiMismatch:
    """`srun --mpi=FLAG` with a library that does not speak it."""
    command = (f"{site.environments[mpi]}/bin/mpipipe", "run", str(site.tiny_config))
    folder = site.folder / f"wrong-{mpi}-{flag}"
    result = site.srun(mpi, f"--mpi={flag}", *command, f"output.dir={folder}")
    return MpiMismatch(result.returncode, result.stderr)


# Whatever hole of the heap MPICH's UCX address falls into, bytes without zeros lie behind it.
_DENSE = """
import asyncio, ctypes, os
from mpipipe.control_plane import mpi
from mpipipe.progress import ProgressEngine
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
holes = []
for size in [*range(64, 2000, 16)] * 12:
    holes.append(libc.malloc(size))
    ctypes.memmove(libc.malloc(6000), os.urandom(6000), 6000)
for hole in holes:
    libc.free(hole)
async def main():
    channel = mpi.open_mpi_control_channel(ProgressEngine(), init_limit_s=30.0)
    print("rank", channel.rank, "of", channel.world_size)
    await channel.aclose()
asyncio.run(main())
"""


def dense_memory(site: Site) -> subprocess.CompletedProcess[str]:
    """MPI starts where the longest values must go through Slurm's pmi2 plugin."""
    script = site.folder / "dense.py"
    script.write_text(_DENSE)
    return site.srun("mpich", "--mpi=pmi2", site.python("mpich"), str(script))


def rank_killed_under_plain_srun(site: Site) -> tuple[int, str, float]:
    """As README has it, without --kill-on-bad-exit: exit code, output, seconds to the end."""
    folder = site.folder / "plain"
    command = (f"{site.environments['mpich']}/bin/mpipipe", "run", str(site.tiny_config))
    many = site.folder / "plain.jsonl"
    many.write_text("".join(json.dumps({"id": f"m{i}", "prompt": "on"}) + "\n" for i in range(999)))
    words = (*command, f"output.dir={folder}", f"prompts.path={many}")
    step = subprocess.Popen(
        site.cluster.command(
            HEAD, "srun", "--partition=short", "-N2", "-n2", "-c2", "--mpi=pmi2", *words
        ),
        env=site.environ("mpich"), cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        journal = folder / "completions_rank_0.jsonl"
        site.until(
            lambda: journal.exists() and bool(journal.read_bytes()), "a completion", JOB_LIMIT_S
        )
        os.kill(_ranks(site, "n4")[0], signal.SIGKILL)
        begin = time.monotonic()
        said, _ = step.communicate(timeout=120)
        return step.returncode, said, time.monotonic() - begin
    finally:
        step.kill()
        step.wait()


def doctor_on_two_nodes(site: Site, mpi: str, flag: str) -> subprocess.CompletedProcess[str]:
    """The doctor by itself, under srun."""
    command = (f"{site.environments[mpi]}/bin/mpipipe", "doctor", DEMO, "--json")
    return site.srun(mpi, f"--mpi={flag}", *command, "output.dir=" + str(site.folder / "doctor"))


def experiment(site: Site) -> JobEnd:
    """`mpipipe bench strong --sbatch` of the tiny model, from submission to the last job.

    An array of two cases on one node and one of two on two nodes.
    """
    out = site.folder / "experiment"
    said = site.cluster.on(
        HEAD, f"{site.environments['mpich']}/bin/mpipipe", "bench", "strong", str(site.tiny_config),
        "--stages=1,2", "--nodes=1,2", "--batch=4", "--prompts=8", "--repeat=1", f"--out={out}",
        "--sbatch", "--sbatch-option=--partition=arrays",
        env=site.environ("mpich", FORCED_NETWORK), cwd=ROOT,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    last = said.stdout.partition("job ")[2].split()[0]
    fields = site.cluster.wait_for_state(last, *ENDED, limit_s=EXPERIMENT_LIMIT_S)
    logs = {path.name: path.read_text() for path in sorted(out.glob("slurm-*.log"))}
    shown = "\n".join(f"--- {path}\n{text}" for path, text in logs.items())
    return JobEnd(
        last, fields, shown, out, {"said": said.stdout, "last": logs[f"slurm-{last}.log"]}
    )


def login_node(site: Site, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of mpipipe on the login node."""
    command = f"{site.environments['mpich']}/bin/mpipipe"
    return site.cluster.on(HEAD, command, *words, env=site.environ("mpich"), cwd=ROOT)
