"""How ranks are started, here and in Slurm; how a launch ends; the scripts of --sbatch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mpipipe.errors import ConfigError, EnvironmentSetupError
from mpipipe.experiments.launch import choose_launcher, run_launch
from mpipipe.experiments.slurm_jobs import job_scripts, submit
from tests.unit.experiment_records import a_matrix

MPICH = "MPICH Version:      5.0.2"
OPEN_MPI = "Open MPI v5.0.7"
COMMAND = ("python", "-m", "mpipipe", "bench", "strong", "c.toml", "--out=/x y")


class Answers:
    """A runner of small programs that answers from a table."""

    def __init__(self, **answers: str) -> None:
        self.answers = answers
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, command: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
        self.asked.append(tuple(command))
        known = {
            "--version": "version",
            "--mpi=list": "listed",
            "--mpi-lib-version": "library",
            "--parsable": "submitted",
        }
        name = next(name for word, name in known.items() if word in command)
        if name not in self.answers:
            raise FileNotFoundError(command[0])
        answer = self.answers[name]
        refused = answer.startswith("refused")
        return subprocess.CompletedProcess(
            command, int(refused), "" if refused else answer, answer if refused else ""
        )


def test_mpirun_starts_the_ranks_outside_of_a_job(tmp_path: Path) -> None:
    mpirun = tmp_path / "mpirun"
    mpirun.write_text("#!/bin/sh\n")
    mpirun.chmod(0o755)
    environ = {"PATH": str(tmp_path)}
    launcher = choose_launcher(environ, Answers(version="HYDRA build details"))
    command = launcher.command(2, 1, ["x"])
    assert command[1:] == ("-n", "2", "x")
    launcher = choose_launcher(environ, Answers(version=f"mpirun ({OPEN_MPI})"))
    words = launcher.command(2, 1, ["x"])
    assert words[1:6] == ("-n", "2", "--bind-to", "none", "--oversubscribe")
    assert ("--allow-run-as-root" in words) == (os.geteuid() == 0)
    with pytest.raises(ConfigError, match="without a Slurm allocation"):
        launcher.command(2, 2, ["x"])


@pytest.mark.parametrize(
    ("library", "listed", "flag"),
    [(MPICH, "none pmi2 pmix".replace(" ", "\n"), "pmi2"), (OPEN_MPI, "pmi2\npmix", "pmix")],
)
def test_srun_gets_the_flag_that_fits_the_library(library: str, listed: str, flag: str) -> None:
    environ = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4", "MPIPIPE_SRUN_FLAGS": "-v --exact"}
    launcher = choose_launcher(environ, Answers(listed=listed, library=library))
    assert launcher.command(3, 2, ["x"]) == (
        "srun", "--nodes=2", "--ntasks=3", "--ntasks-per-node=2", f"--mpi={flag}",
        "--kill-on-bad-exit=1", "--cpus-per-task=4", "-v", "--exact", "x",
    )  # fmt: skip


def test_a_flag_that_is_given_is_taken_without_asking() -> None:
    environ = {"SLURM_JOB_ID": "7", "MPIPIPE_SRUN_MPI": "cray_shasta"}
    assert "--mpi=cray_shasta" in choose_launcher(environ, Answers()).command(1, 1, ["x"])
    with pytest.raises(EnvironmentSetupError, match="srun does not answer"):
        choose_launcher({"SLURM_JOB_ID": "7"}, Answers())


def test_a_rank_alone_on_its_node_gets_the_cores_of_one_task() -> None:
    answers = Answers(listed="pmi2", library=MPICH)
    environ = {"SLURM_JOB_ID": "7"}
    for num_stages in (1, 2):
        launcher = choose_launcher(environ, answers, equal_cores=True)
        assert "--cpus-per-task=1" in launcher.command(num_stages, 1, ["x"])
    environ["SLURM_CPUS_PER_TASK"] = "4"
    launcher = choose_launcher(environ, answers, equal_cores=True)
    assert "--cpus-per-task=4" in launcher.command(1, 1, ["x"])
    alone = choose_launcher({"SLURM_JOB_ID": "7"}, answers).command(2, 1, ["x"])
    assert not any(word.startswith("--cpus-per-task") for word in alone)


def test_a_launch_leaves_its_exit_code_and_its_last_error(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    code = "import sys; print('mpipipe: error: no'); print('bye', file=sys.stderr); sys.exit(5)"
    launched = run_launch([sys.executable, "-c", code], log, limit_s=60)
    assert (launched.exit_code, launched.last_line) == (5, "mpipipe: error: no")
    assert "bye" in log.read_text()
    with pytest.raises(EnvironmentSetupError, match="could not be started"):
        run_launch([str(tmp_path / "none")], log, limit_s=60)


def sleeper(told: Path) -> str:
    """The code of a process that ignores SIGTERM, tells its number, and stays."""
    return (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"open({str(told)!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(600)"
    )


def until(holds: Callable[[], bool]) -> None:
    limit_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < limit_s
        time.sleep(0.01)


def pid_in(told: Path) -> int:
    until(lambda: told.exists() and told.read_text().endswith(" "))
    return int(told.read_text())


def has_ended(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


def test_a_launch_is_ended_at_its_limit_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "pid"

    class Patient(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            pid_in(told)  # the limit begins when the child is there
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Patient)
    script = (
        "import subprocess, sys; "
        f"subprocess.Popen([sys.executable, '-c', {sleeper(told)!r}]).wait()"
    )
    launched = run_launch([sys.executable, "-c", script], tmp_path / "x.log", limit_s=0.1)
    assert launched.exit_code is None
    assert 0.1 <= launched.wall_s < 60
    pid = pid_in(told)
    until(lambda: has_ended(pid))


def test_a_second_interrupt_leaves_no_launch_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "pid"

    class Interrupted(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            pid_in(told)
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_launch([sys.executable, "-c", sleeper(told)], tmp_path / "x.log", limit_s=60)
    pid = pid_in(told)
    until(lambda: has_ended(pid))


def test_a_launcher_ends_with_the_command_that_was_killed(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    launcher = sleeper(told).replace("SIG_IGN", "SIG_DFL")
    script = (
        "import sys; from pathlib import Path; from mpipipe.experiments.launch import run_launch; "
        f"run_launch([sys.executable, '-c', {launcher!r}], Path({str(tmp_path / 'x.log')!r}), 60)"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as bench:
        pid = pid_in(told)
        assert not has_ended(pid)
        bench.kill()
    until(lambda: has_ended(pid))


def test_cases_on_other_numbers_of_nodes_are_arrays_of_their_own(tmp_path: Path) -> None:
    matrix = a_matrix("strong", batches=(4,), nodes=(1, 2), timeout_s=90.0)
    missing = [case.name for case in matrix.cases if case.name != "memory-filling_n1"]
    arrays, last = job_scripts(matrix, tmp_path, COMMAND, missing)
    assert [script.name for script in arrays] == ["strong_1_nodes.sbatch", "strong_2_nodes.sbatch"]
    one, two = (script.text for script in arrays)
    assert "#SBATCH --array=0-0\n" in one
    assert "cases=(fixed-total_n1)\n" in one
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --array=0-1\n" in two
    assert "#SBATCH --time=15\n" in two  # six launches of 90 s, a minute for each to begin and end
    assert """--out=/x y' --case "${cases[$SLURM_ARRAY_TASK_ID]}"\n""" in two
    assert f"python -m mpipipe report {tmp_path}" in last.text
    for script in (*arrays, last):
        path = tmp_path / script.name
        path.write_text(script.text)
        subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize(("table", "report", "code"), [(0, 0, 0), (4, 0, 4), (0, 3, 3), (4, 3, 4)])
def test_the_last_job_fails_as_the_experiment_did(
    tmp_path: Path, table: int, report: int, code: int
) -> None:
    command = tmp_path / "python"
    lines = ["#!/bin/sh", f'echo "$@" >>{tmp_path}/said', f'[ "$3" = report ] && exit {report}']
    command.write_text("\n".join([*lines, f"exit {table}"]) + "\n")
    command.chmod(0o755)
    words = (str(command), "-m", "mpipipe", "bench", "batch", "c.toml")
    _, last = job_scripts(a_matrix("batch"), tmp_path, words, [])
    result = subprocess.run(["bash", "-c", last.text], check=False)
    assert result.returncode == code
    said = (tmp_path / "said").read_text().splitlines()
    assert said == ["-m mpipipe bench batch c.toml --table", f"-m mpipipe report {tmp_path}"]


def test_the_logs_of_jobs_go_to_a_folder_of_any_name() -> None:
    folder = Path("/x y/50% of #1")
    arrays, last = job_scripts(a_matrix("batch"), folder, COMMAND, ["batch_1"])
    assert "#SBATCH --output='/x y/50%% of #1/slurm-%A_%a.log'\n" in arrays[0].text
    assert "#SBATCH --output='/x y/50%% of #1/slurm-%j.log'\n" in last.text
    (plain, _) = job_scripts(a_matrix("batch"), Path("/x"), COMMAND, ["batch_1"])
    assert "#SBATCH --output=/x/slurm-%A_%a.log\n" in plain[0].text


def test_the_last_job_waits_for_all_arrays_and_asks_for_no_gpu(tmp_path: Path) -> None:
    matrix = a_matrix("strong", batches=(4,), nodes=(1, 2))
    arrays, last = job_scripts(matrix, tmp_path, COMMAND, [case.name for case in matrix.cases])
    run = Answers(submitted="41;cluster\n")
    ids, last_id = submit(arrays, last, tmp_path, ["--gres=gpu:1", "-pshort"], run)
    assert (ids, last_id) == (["41", "41"], "41")
    assert run.asked[0][:4] == ("sbatch", "--parsable", "--gres=gpu:1", "-pshort")
    assert run.asked[-1][2:4] == ("-pshort", "--dependency=afterany:41:41")
    assert (tmp_path / "strong_report.sbatch").read_text() == last.text


def test_what_sbatch_says_is_told(tmp_path: Path) -> None:
    arrays, last = job_scripts(a_matrix("batch"), tmp_path, COMMAND, [])
    with pytest.raises(EnvironmentSetupError, match=r"refused: no account.*--sbatch-option"):
        submit(arrays, last, tmp_path, [], Answers(submitted="refused: no account"))
    with pytest.raises(EnvironmentSetupError, match="login node"):
        submit(arrays, last, tmp_path, [], Answers())
