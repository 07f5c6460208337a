"""Runs that are slowed on purpose, each explained by `mpipipe logs summary` naming the culprit.

Each test makes one thing slow and nothing else, on two ranks with a small model, and asks what a
user asks. What is slowed is the real thing where a machine can do it: a link between two
network namespaces that lets few bytes through, a busy process on a rank's core, a rank that is
stopped by a signal, prompts of other lengths. A stage that sleeps and a disk that is slow are put
into one rank by `slowed_rank`. Where the time of a test depends on the machine's speed, both stages
sleep as long in each step (`PACE`), so that what is slowed is large beside it everywhere.

Alone on the machine, as chaos: two tests at once share cores, which is one of the culprits. A run
that other work got in the way of says nothing about what was planted: `explain` repeats it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.processes import MARK, end_all
from tests.e2e.conftest import ROOT, mpiexec, read_jsonl
from tests.slowed.conftest import Job, core_of, make_job
from tests.slurm.network import Network

PACE = "stage:*:0.005"
STEP_S = 0.005
LIMIT_S = 120.0
NUM_RIVALS = 5  # more than a machine that runs other tests, too, puts on the other core
TRIALS = 3
BUSY_PERCENT = 25  # of a core, used by others: more than a quiet machine's own chores
QUIET_LIMIT_S = 120.0
pytestmark = pytest.mark.timeout(1500)  # three runs of 400 s at most, and waits for quiet

Culprit = Mapping[str, Any]


def explain(job: Job, launch: Callable[[Job], None], check: Callable[[Culprit], None]) -> None:
    """Launch the job, and check whom its files name.

    Once more, when the machine is quiet again, if that failed while other work took a core: the
    culprit is then that work, or hidden by it. It fails for good where it fails undisturbed.
    """
    for number in range(TRIALS):
        trial = replace(job, folder=job.folder.with_name(f"run_{number}"))
        launch(trial)
        try:
            check(trial.culprit())
        except AssertionError as error:
            percent = others_percent(trial.folder)
            error.add_note(f"run {number + 1}: others used {percent:.0f} % of a core")
            if percent < BUSY_PERCENT or number + 1 == TRIALS:
                raise
            wait_for_quiet()
        else:
            return


def wait_for_quiet() -> None:
    """Until less than BUSY_PERCENT of a core is used, or for QUIET_LIMIT_S."""
    until_s = time.monotonic() + QUIET_LIMIT_S
    while time.monotonic() < until_s:
        idle_s, begin_s = _idle_s(), time.monotonic()
        time.sleep(1)
        used_s = (os.cpu_count() or 1) * (time.monotonic() - begin_s) - (_idle_s() - idle_s)
        if used_s < BUSY_PERCENT / 100:
            return


def _idle_s() -> float:
    """The seconds that all cores together have been idle, disks waited for included."""
    _, _, _, _, idle, waiting, *_ = Path("/proc/stat").read_text().split()
    return (int(idle) + int(waiting)) / os.sysconf("SC_CLK_TCK")


def check(culprit: Culprit, kind: str, **fields: object) -> None:
    """The culprit is of that kind, and has those fields."""
    assert culprit["kind"] == kind, culprit
    for name, value in fields.items():
        assert culprit[name] == value, culprit


def others_percent(folder: Path) -> float:
    """CPU that other processes used in a run, in percent of a core, on an average."""
    ranks = [read_jsonl(folder / f"samples_rank_{rank}.jsonl") for rank in (0, 1)]
    shares = [
        float(first["node_cpu_percent"]) * (os.cpu_count() or 1)
        - float(first["cpu_percent"])
        - float(second["cpu_percent"])
        for first, second in zip(*ranks, strict=False)
        if None not in (first["node_cpu_percent"], first["cpu_percent"], second["cpu_percent"])
    ]
    return sum(shares) / max(1, len(shares))


def test_a_run_that_nothing_slows_has_no_culprit(job: Job) -> None:
    """Both stages sleep as long: what a run waits for by itself is no one's fault."""

    def no_one(culprit: Culprit) -> None:
        check(culprit, "none", rank=None, stage=None, seconds=0.0)
        assert culprit["sentence"].startswith("no single culprit")

    explain(job, lambda job: job.run(slowed=PACE), no_one)


def test_a_stage_that_sleeps_in_each_step_is_the_slow_stage(job: Job) -> None:
    def second_stage(culprit: Culprit) -> None:
        check(culprit, "slow_stage", rank=1, stage=1)
        # Two slots of 48 decode steps, and their prompts; the bare steps are of one length. Some
        # kernels end a sleep at their next tick, up to 10 ms late, and none ends it early.
        slept_s = 2 * 48 * STEP_S
        assert 0.5 * slept_s < culprit["seconds"] < 4 * slept_s
        assert "stage 1 is the slowest" in culprit["sentence"]

    explain(job, lambda job: job.run(slowed=f"stage:1:{STEP_S}"), second_stage)


def test_a_disk_that_one_rank_reads_slowly_is_the_slow_read(job: Job) -> None:
    def second_rank(culprit: Culprit) -> None:
        check(culprit, "slow_read", rank=1, stage=1)
        assert culprit["seconds"] > 2
        found = re.search(r"rank 1 read its weights at ([0-9.]+) MB/s", culprit["sentence"])
        assert found, culprit["sentence"]
        assert 1.0 < float(found[1]) <= 2.0, "no faster than that disk; reading takes time, too"

    explain(job, lambda job: job.run(slowed="read:1:2e6"), second_rank)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    network = Network(f"slowed-{os.getpid()}", ["n1", "n2"], tmp_path / "hosts")
    network.open()
    try:
        yield network
    finally:
        network.close()


def test_a_link_that_lets_few_bytes_through_is_the_slow_link(job: Job, network: Network) -> None:
    network.throttle("n1", "4mbit")

    def launch(job: Job) -> None:
        mpmd, words = [":", "-n", "1"], job.words(warm=False)
        ours = [*network.enter("n1"), *words, *mpmd, *network.enter("n2"), *words]
        # Not by shared memory, which namespaces of one machine still have.
        apart = {"UCX_TLS": "tcp,self", "MPIR_CVAR_NOLOCAL": "1"}
        job.execute([*mpiexec(1), *ours], slowed=PACE, **apart)

    def first_link(culprit: Culprit) -> None:
        check(culprit, "slow_link", rank=1, stage=1)
        assert "the link 0→1 took" in culprit["sentence"]

    explain(job, launch, first_link)


@contextmanager
def busy(core: int) -> Iterator[None]:
    """A core kept busy by others: a rank there gets a sixth of it."""
    # It ends with this process, also where a time limit kills it.
    work = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
    words = ["taskset", "--cpu-list", str(core), sys.executable, "-c", work]
    # The kernel shares a core out between sessions first (autogroups).
    processes = [subprocess.Popen(words, start_new_session=True) for _ in range(NUM_RIVALS)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def running(
    job: Job, *words: str, slowed: str, before: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A launch whose second rank has told of a step; none of its processes outlives the block."""
    mark = str(job.folder)
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "SLOWED": slowed, MARK: mark}
    command = [*mpiexec(2), *before, *job.words(*words)]
    process = subprocess.Popen(command, cwd=ROOT, env=environ)
    try:
        steps = job.folder / "steps_rank_1.jsonl"
        until_s = time.monotonic() + LIMIT_S
        while not (steps.exists() and steps.stat().st_size):
            assert process.poll() is None
            assert time.monotonic() < until_s
            time.sleep(0.02)
        yield process
    finally:
        end_all(mark)
        process.wait()


def test_a_rank_that_shares_its_core_with_a_busy_process_is_named(
    demo_model: Path, tmp_path: Path
) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("both ranks and the busy process would share the only core")
    job = make_job(tmp_path, demo_model, [12] * 8)
    own = 'exec taskset --cpu-list "$(("$PMI_RANK" ? $1 : $0))" "${@:2}"'
    before = ["bash", "-c", own, str(core_of(0)), str(core_of(1))]

    def launch(job: Job) -> None:
        # From the first step on: a boot on a sixth of a core takes a minute and shows nothing.
        words = "pipeline.bind=none"
        with running(job, words, before=before, slowed="") as process, busy(core_of(1)):
            assert process.wait(LIMIT_S) == 0

    def second_core(culprit: Culprit) -> None:
        check(culprit, "shared_core", rank=1, stage=1)
        assert "rank 1 shares its core" in culprit["sentence"]

    explain(job, launch, second_core)


def test_prompts_of_very_unequal_length_are_named(model: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, model, [200, 4, 4, 4])

    def prompts(culprit: Culprit) -> None:
        check(culprit, "unequal_prompts", rank=None)
        assert culprit["seconds"] > 100 * STEP_S

    explain(job, lambda job: job.run(slowed=PACE), prompts)


def pid_of(folder: Path, rank: int) -> int:
    """The process that computes for a rank, as the ranks told each other."""
    events = read_jsonl(folder / f"rank_{rank}.log")
    (resources,) = (event["resources"] for event in events if event["event"] == "handshake")
    return int(resources[rank]["pid"])


def test_a_rank_that_is_stopped_for_four_seconds_is_a_stall(model: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, model, [200] * 8)
    stopped_s = 0.0

    def launch(job: Job) -> None:
        nonlocal stopped_s
        with running(job, "log.steps=all", slowed=PACE) as process:
            second = pid_of(job.folder, rank=1)
            begin_s = time.monotonic()
            os.kill(second, signal.SIGSTOP)
            time.sleep(4)
            os.kill(second, signal.SIGCONT)
            stopped_s = time.monotonic() - begin_s  # the test itself may have been late
            assert process.wait(LIMIT_S) == 0

    def second_rank(culprit: Culprit) -> None:
        check(culprit, "stall", rank=1, stage=1)
        assert culprit["seconds"] == pytest.approx(stopped_s, abs=0.7)

    explain(job, launch, second_rank)
