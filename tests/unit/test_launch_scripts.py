"""launch/submit.sbatch, run.sh and in_image.sh, with stand-ins for Slurm and the container.

The real Slurm is in tests/slurm; here is what it is asked for, and what its answers lead to.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
PROGRAMS = {
    # What every stand-in is asked for goes to calls; how it answers is in the environment.
    "srun": """
        echo "srun $*" >>"$CALLS"
        case $1 in --mpi=list) echo "MPI plugin types are... none pmi2"; exit 0 ;; esac
        while [ $# -gt 0 ]; do case $1 in --*) shift ;; *) break ;; esac; done
        exec "$@" """,
    "mpipipe": """
        case "$1 $2" in
        "slurm workspace") echo "workspace $*" >>"$CALLS"
            printf 'config=/copy.toml models=("%s") words=(a.b=c output.dir=/o)\\n' \
                "$MODEL" >"${!#}/job.env" ;;
        "slurm mpi-flag") echo pmi2 ;;
        doctor*) exit "${DOCTOR_CODE:-0}" ;;
        run*) [ -z "${RUN_WAITS:-}" ] || { trap 'exit 75' USR1; echo ready >"$RUN_WAITS"
                while :; do sleep 0.01; done; }
            exit "${RUN_CODE:-0}" ;;
        esac""",
    "scontrol": 'echo "scontrol $*" >>"$CALLS"; [ "$1" != requeue ] || exit "${REQUEUE_CODE:-1}"',
    "sacct": 'printf "JobID|State\\n7|RUNNING\\n7.0|COMPLETED\\n"',
    "sbatch": 'echo "sbatch $* account=${SBATCH_ACCOUNT:-}" >>"$CALLS"',
    "apptainer": 'echo "apptainer $*" >>"$CALLS"; env >"$IMAGE_ENV"',
    "hostname": "echo node",
}


class Stand:
    """A login and compute node of stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        self.model = folder / "model"
        self.job = folder / "scratch/demo-7"
        self.bin = folder / "venv/bin"
        self.environ: dict[str, str] = {}

    def build(self) -> Stand:
        self.bin.mkdir(parents=True)
        self.model.mkdir()
        for name, text in PROGRAMS.items():
            path = self.bin / name
            path.write_text(f"#!/usr/bin/env bash\n{text}\n")
            path.chmod(0o755)
        self.environ = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "CALLS": str(self.calls),
            "MODEL": str(self.model),
            "IMAGE_ENV": str(self.folder / "image.env"),
            "SLURM_JOB_ID": "7",
            "MPIPIPE_SCRATCH": str(self.folder / "scratch"),
            "MPIPIPE_VENV": str(self.folder / "venv"),
        }
        return self

    def start(
        self, script: str, *words: str, environ: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(LAUNCH / script), *words],
            env=self.environ | dict(environ or {}),
            cwd=LAUNCH.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, script: str, *words: str, **environ: str) -> tuple[int, str]:
        process = self.start(script, *words, environ=environ)
        text, _ = process.communicate(timeout=30)
        return process.returncode, text

    def asked(self, program: str) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if line.startswith(program)]


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    if shutil.which("bash") is None:
        pytest.fail("the launch scripts need bash")
    return Stand(tmp_path).build()


def test_the_doctor_comes_before_the_run_and_both_take_the_copies(stand: Stand) -> None:
    code, text = stand.run("run.sh", "configs/demo.toml", "generation.seed=3")
    assert code == 0, text
    flags = "srun --mpi=pmi2 --kill-on-bad-exit=1"
    assert stand.asked("srun --mpi=pmi2") == [
        f"{flags} mpipipe doctor /copy.toml a.b=c output.dir=/o",
        f"{flags} mpipipe run /copy.toml a.b=c output.dir=/o",
    ]
    assert (stand.job / "sacct.txt").read_text().startswith("JobID|State")


def test_a_fatal_finding_ends_the_job_with_its_code_before_the_run(stand: Stand) -> None:
    code, text = stand.run("run.sh", "configs/demo.toml", DOCTOR_CODE="5")
    assert code == 5
    assert "before the model is loaded" in text
    assert not [line for line in stand.asked("srun") if "mpipipe run" in line]


def test_a_job_that_starts_again_reads_the_copies_of_the_first_time(stand: Stand) -> None:
    for _ in range(2):
        assert stand.run("run.sh", "configs/demo.toml", MPIPIPE_DOCTOR="off")[0] == 0
    assert len(stand.asked("workspace")) == 1


def test_a_task_of_an_array_has_its_own_folder_and_number(stand: Stand) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "9"}
    code, text = stand.run("run.sh", "configs/demo.toml", "generation.seed=%a", **array)
    assert code == 0, text
    assert "generation.seed=2 " in stand.asked("workspace")[0]
    assert (stand.folder / "scratch/demo-7_2/job.env").exists()


@pytest.mark.parametrize(
    ("code", "restarts", "requeues"), [(75, 0, 1), (75, 2, 0), (0, 0, 0), (6, 0, 0)]
)
def test_only_a_job_that_stopped_in_time_goes_back_into_the_queue(
    stand: Stand, code: int, restarts: int, requeues: int
) -> None:
    limits = {"MPIPIPE_MAX_RESTARTS": "2", "SLURM_RESTART_COUNT": str(restarts)}
    ended, text = stand.run("submit.sbatch", "configs/demo.toml", RUN_CODE=str(code), **limits)
    assert ended == code, text
    assert stand.asked("scontrol requeue") == ["scontrol requeue 7"] * requeues


def test_the_signal_before_the_wall_time_reaches_the_ranks(stand: Stand) -> None:
    ready = stand.folder / "ready"
    os.mkfifo(ready)
    process = stand.start("submit.sbatch", "configs/demo.toml", environ={"RUN_WAITS": str(ready)})
    assert ready.read_text() == "ready\n"  # the run's trap is set
    process.send_signal(signal.SIGUSR1)
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 75, text
    assert stand.asked("scontrol requeue"), "told to stop: it goes on later"


def test_outside_a_job_the_script_submits_itself_with_the_account_of_the_site(
    stand: Stand,
) -> None:
    site = stand.folder / "my.env"
    site.write_text((LAUNCH / "site.env").read_text() + "export SBATCH_ACCOUNT=physics\n")
    del stand.environ["SLURM_JOB_ID"]
    code, text = stand.run("submit.sbatch", "configs/demo.toml", MPIPIPE_SITE_ENV=str(site))
    assert code == 0, text
    assert stand.asked("sbatch") == [
        f"sbatch {LAUNCH}/submit.sbatch configs/demo.toml account=physics"
    ]


def test_the_image_gets_what_ranks_need_and_no_library_path_of_the_host(stand: Stand) -> None:
    image = stand.folder / "image.sif"
    image.touch()
    code, text = stand.run(
        "in_image.sh",
        "mpipipe",
        "run",
        MPIPIPE_IMAGE=str(image),
        MPIPIPE_NV="on",
        MPIPIPE_JOB_BINDS="/job,/m:/m:ro",
        PMI_RANK="3",
        PMIX_SERVER_TMPDIR=str(stand.model),
        CUDA_VISIBLE_DEVICES="1",
        LD_LIBRARY_PATH="/host/cuda",
        PYTHONPATH="/host/python",
    )
    assert code == 0, text
    call = stand.asked("apptainer")[0]
    assert "--cleanenv" in call
    assert " --nv " in call
    assert f"--bind {stand.model} --bind /job --bind /m:/m:ro" in call
    assert call.endswith(f"{image} mpipipe run")
    passed = (stand.folder / "image.env").read_text().splitlines()
    assert "APPTAINERENV_PMI_RANK=3" in passed
    assert "APPTAINERENV_CUDA_VISIBLE_DEVICES=1" in passed
    assert not [
        line for line in passed if line.startswith(("APPTAINERENV_LD_", "APPTAINERENV_PYTHONPATH"))
    ]


def test_a_model_folder_made_of_links_is_bound_with_what_they_point_to(stand: Stand) -> None:
    (stand.folder / "blobs").mkdir()
    (stand.folder / "blobs/1").touch()
    (stand.model / "config.json").symlink_to("../blobs/1")
    image = stand.folder / "image.sif"
    image.touch()
    # The job's folder is there already: the stand-in for the image starts nothing that makes it.
    stand.job.mkdir(parents=True)
    (stand.job / "job.env").write_text(f"config=/c models=({stand.model}) words=()\n")
    code, text = stand.run(
        "run.sh", "configs/demo.toml", MPIPIPE_IMAGE=str(image), MPIPIPE_SRUN_MPI="pmi2"
    )
    assert code == 0, text
    call = stand.asked("apptainer")[-1]
    for folder in (stand.model, stand.folder / "blobs"):
        assert f"--bind {folder}:{folder}:ro" in call
    assert f"--bind {stand.folder}:" not in call, "not the folder above the model"


@pytest.mark.parametrize(
    ("script", "environ", "said"),
    [
        ("run.sh", {"SLURM_JOB_ID": ""}, "mpirun -n 2 mpipipe run"),
        ("run.sh", {"MPIPIPE_IMAGE": "/no/image.sif"}, "/no/image.sif does not exist"),
        ("run.sh", {"MPIPIPE_MODULES": "cuda"}, "no module command"),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(
    stand: Stand, script: str, environ: dict[str, str], said: str
) -> None:
    code, text = stand.run(script, "configs/demo.toml", **environ)
    assert code == 2
    assert said in text


def test_every_example_runs_the_one_submit_script() -> None:
    examples = sorted((LAUNCH / "examples").glob("*.sbatch"))
    assert len(examples) == 4
    for path in examples:
        text = path.read_text()
        assert "/launch/submit.sbatch" in text, path.name
        for option in ("--signal=B:USR1@120", "--requeue", "--open-mode=append"):
            assert f"#SBATCH {option}" in text, f"{path.name}: {option}"
