"""launch/submit.sbatch, run.sh and in_image.sh, with stand-ins for Slurm and the container.

The real Slurm is in tests/slurm; here is what it is asked for, and what its answers lead to.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

import mpipipe
from tests.unit.launch_stand import LAUNCH, Stand


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
    assert (stand.job / "outputs/sacct_7.txt").read_text().startswith("JobID|State")


def test_a_fatal_finding_ends_the_job_with_its_code_before_the_run(stand: Stand) -> None:
    code, text = stand.run("run.sh", "configs/demo.toml", DOCTOR_CODE="5")
    assert code == 5
    assert "before the model is loaded" in text
    assert not [line for line in stand.asked("srun") if "mpipipe run" in line]


def test_what_slurm_counted_of_earlier_jobs_in_the_folder_is_asked_for_again(stand: Stand) -> None:
    outputs = stand.job / "outputs"
    outputs.mkdir(parents=True)
    for job, state in (("5", "COMPLETED"), ("6", "RUNNING"), ("6_2", "RUNNING")):
        (outputs / f"sacct_{job}.txt").write_text(f"JobID|State\n{job}|{state}|\n")
    code, text = stand.run("run.sh", "configs/demo.toml", MPIPIPE_DOCTOR="off")
    assert code == 0, text
    asked = [re.search(r"--jobs=(\S+)", line) for line in stand.asked("sacct")]
    # Of its own job when it begins, should it not come to its end, and when its steps have ended.
    assert [found[1] for found in asked if found] == ["6", "6_2", "7", "7"]
    assert "7.0|COMPLETED" in (outputs / "sacct_6.txt").read_text()
    assert "5|COMPLETED" in (outputs / "sacct_5.txt").read_text()


def test_where_the_accounting_has_forgotten_an_earlier_job_its_file_stays(stand: Stand) -> None:
    outputs = stand.job / "outputs"
    outputs.mkdir(parents=True)
    (outputs / "sacct_6.txt").write_text("JobID|State\n6|RUNNING|\n")
    stand.program("sacct", 'echo "sacct $*" >>"$CALLS"; exit 1')
    stand.program("sleep", 'echo "sleep $*" >>"$CALLS"')
    environ = {"MPIPIPE_DOCTOR": "off", "RECORD": "JobId=7 JobState=RUNNING"}
    assert stand.run("run.sh", "configs/demo.toml", **environ)[0] == 0
    assert not stand.asked("sleep"), "nothing is waited for where there is no accounting"
    assert (outputs / "sacct_6.txt").read_text().startswith("JobID|State")
    assert (outputs / "sacct_7.txt").read_text() == "JobId=7 JobState=RUNNING\n"
    assert not list(outputs.glob("*.part"))


@pytest.mark.parametrize("word", ["profile.tool=perf", 'profile.tool="nsys"'])
def test_the_ranks_of_the_run_are_put_behind_the_profiler_and_the_doctors_are_not(
    stand: Stand, word: str
) -> None:
    stand.job.mkdir(parents=True)
    (stand.job / "job.env").write_text("config=/c models=() words=() profiler=perf\n")
    code, text = stand.run("run.sh", str(stand.job), word)
    assert code == 0, text
    _, doctor, run = stand.asked("srun")
    tool = "nsys" if "nsys" in word else "perf"
    wrapped = f"{LAUNCH}/profile_rank.sh {tool} {stand.job}/outputs mpipipe run /c"
    assert wrapped in run
    assert "profile_rank" not in doctor


def test_a_profiler_in_an_image_sees_the_script_that_starts_it(stand: Stand) -> None:
    stand.job.mkdir(parents=True)
    (stand.job / "job.env").write_text("config=/c models=() words=() profiler=perf\n")
    (stand.folder / "image.sif").touch()
    image = {"MPIPIPE_IMAGE": str(stand.folder / "image.sif"), "MPIPIPE_SRUN_MPI": "pmi2"}
    stand.run("run.sh", str(stand.job), **image)
    call = stand.asked("apptainer")[-1]
    assert f"--bind {LAUNCH}:{LAUNCH}:ro" in call
    assert f"image.sif {LAUNCH}/profile_rank.sh perf" in call


def doctors(stand: Stand) -> list[str]:
    return [line for line in stand.asked("srun") if "mpipipe doctor" in line]


def test_a_job_that_starts_again_on_nodes_that_were_found_well_does_not_ask_the_doctor_again(
    stand: Stand,
) -> None:
    stand.run("run.sh", "configs/demo.toml", SLURM_JOB_NODELIST="n[1-2]")
    again = {"SLURM_RESTART_COUNT": "1"}
    code, text = stand.run("run.sh", "configs/demo.toml", SLURM_JOB_NODELIST="n[1-2]", **again)
    assert code == 0, text
    assert len(doctors(stand)) == 1
    assert "earlier attempt" in text
    stand.run("run.sh", "configs/demo.toml", SLURM_JOB_NODELIST="n[2-3]", **again)
    assert len(doctors(stand)) == 2, "other nodes"


def test_nodes_that_were_found_ill_are_looked_at_again(stand: Stand) -> None:
    stand.run("run.sh", "configs/demo.toml", DOCTOR_CODE="5")
    stand.run("run.sh", "configs/demo.toml", SLURM_RESTART_COUNT="1")
    assert len(doctors(stand)) == 2


@pytest.mark.parametrize(
    ("left_s", "flags"), [(100, None), (250, "--quick /copy.toml"), (900, "/copy.toml")]
)
def test_the_last_minutes_of_a_job_are_for_its_prompts(
    stand: Stand, left_s: int, flags: str | None
) -> None:
    environ = {"SLURM_JOB_END_TIME": str(int(time.time()) + left_s)}
    code, text = stand.run("run.sh", "configs/demo.toml", **environ)
    assert code == 0, text
    assert (flags is not None) == bool(doctors(stand))
    assert flags is None or f"mpipipe doctor {flags}" in doctors(stand)[0]


def test_nodes_without_a_task_are_warned_about(stand: Stand) -> None:
    few = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "1"}
    assert "1 tasks on 2 nodes" in stand.run("run.sh", "configs/demo.toml", **few)[1]
    enough = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2"}
    assert "tasks on 2 nodes" not in stand.run("run.sh", "configs/demo.toml", **enough)[1]


def test_what_slurm_says_of_the_job_is_kept_for_those_who_go_on_with_it(stand: Stand) -> None:
    record = "JobId=7 StdOut=/w/my log.txt NumNodes=2 TimeLimit=00:10:00"
    stand.run("run.sh", "configs/demo.toml", RECORD=record)
    assert (stand.job / "scontrol.txt").read_text() == record + "\n"


def test_the_log_of_an_arrays_task_gets_a_name_with_the_number_of_the_task(stand: Stand) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "9"}
    log = stand.folder / "mpipipe-9.log"
    log.write_text("said")
    for record in (f"JobId=9 StdOut={log} Power=", f"JobId=9 Power= StdOut={log}"):
        stand.run("submit.sbatch", "configs/demo.toml", RECORD=record, **array)
        assert (stand.folder / "mpipipe-7_2.log").read_text() == "said"
    # A name of the user's own stays alone.
    stand.run("submit.sbatch", "x.toml", RECORD=f"StdOut={stand.folder}/a-7_3.log", **array)
    assert len(list(stand.folder.glob("*7_*"))) == 1


def test_the_folder_of_an_earlier_job_in_the_place_of_a_configuration_goes_on(stand: Stand) -> None:
    stand.job.mkdir(parents=True)
    (stand.job / "job.env").write_text("config=/c.toml models=() words=(a.b=c)\n")
    (stand.job / "strikes").write_text("1\n")
    environ = {"SLURM_JOB_ID": "9", "MPIPIPE_DOCTOR": "off"}
    code, text = stand.run("run.sh", str(stand.job), "pipeline.num_slots=3", **environ)
    assert code == 0, text
    assert not stand.asked("workspace")
    words = "a.b=c output.resume=true pipeline.num_slots=3"
    assert stand.asked("srun")[-1].endswith(f"mpipipe run /c.toml {words}")
    assert not (stand.job / "strikes").exists(), "what is asked for anew has not failed yet"


def test_such_a_folder_is_where_the_output_goes(stand: Stand) -> None:
    stand.job.mkdir(parents=True)
    (stand.job / "job.env").write_text("config=/c.toml models=() words=()\n")
    code, text = stand.run("run.sh", str(stand.job), "generation.seed=1", "output.dir=/elsewhere")
    assert code == 2
    assert "output.dir= contradicts the folder" in text


def test_a_folder_of_something_else_is_refused(stand: Stand) -> None:
    code, text = stand.run("run.sh", str(stand.model))
    assert code == 2
    assert "no job.env" in text


@pytest.mark.parametrize("image", [False, True])
def test_a_missing_model_folder_is_left_to_the_doctor(stand: Stand, image: bool) -> None:
    stand.job.mkdir(parents=True)
    (stand.job / "job.env").write_text("config=/c models=(/no/model) words=()\n")
    environ = {"DOCTOR_CODE": "3", "MPIPIPE_SRUN_MPI": "pmi2"}
    if image:
        (stand.folder / "image.sif").touch()
        environ |= {"MPIPIPE_IMAGE": str(stand.folder / "image.sif"), "IMAGE_CODE": "3"}
    code, text = stand.run("run.sh", str(stand.job), **environ)
    assert stand.asked("srun"), text
    assert "mpipipe doctor /c" in stand.asked("srun")[0]
    assert code == 3


def test_a_task_of_an_array_has_its_own_number(stand: Stand) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "9"}
    code, text = stand.run("run.sh", "configs/demo.toml", "generation.seed=%a", **array)
    assert code == 0, text
    assert "generation.seed=2 --scratch" in stand.asked("workspace")[0]


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
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 75, text
    assert stand.asked("scontrol requeue"), "told to stop: it goes on later"


@pytest.mark.parametrize(
    ("script", "where"), [("submit.sbatch", "show"), ("run.sh", "flag"), ("run.sh", "deaf")]
)
def test_a_signal_that_comes_before_the_run_can_hear_it_is_a_stop_too(
    stand: Stand, script: str, where: str
) -> None:
    fifo = stand.folder / "fifo"
    os.mkfifo(fifo)
    environ = {"WAITS_AT": where, "MPIPIPE_DOCTOR": "off"}
    process = stand.start(script, "configs/demo.toml", environ=environ)
    assert fifo.read_text() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    if where != "deaf":  # there the run is ended by the signal
        fifo.write_text("go on\n")
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 75, text
    runs = [line for line in stand.asked("srun") if "mpipipe run" in line]
    assert len(runs) == (where == "deaf")
    assert bool(stand.asked("scontrol requeue")) == (script == "submit.sbatch")


def test_only_one_task_of_an_array_is_asked_about_and_put_back(stand: Stand) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "7"}
    code, text = stand.run("submit.sbatch", "configs/demo.toml", RUN_CODE="75", **array)
    assert code == 75, text
    asked = [*stand.asked("scontrol"), *stand.asked("squeue"), *stand.asked("sacct")]
    assert len(asked) >= 4
    for line in asked:
        assert re.search(r"[ =]7_2( |$)", line), line


def test_two_attempts_without_a_new_completion_are_the_last(stand: Stand) -> None:
    (stand.job / "outputs").mkdir(parents=True)

    def attempt(restarts: int, adds: str) -> tuple[int, str, int]:
        environ = {"SLURM_RESTART_COUNT": str(restarts), "RUN_ADDS": adds, "RUN_CODE": "75"}
        code, text = stand.run("submit.sbatch", "configs/demo.toml", **environ)
        return code, text, len(stand.asked("scontrol requeue"))

    for restarts, adds in enumerate(("", "yes", "", "yes", "")):
        code, text, requeues = attempt(restarts, adds)
        assert (code, requeues) == (75, restarts + 1), text
    code, text, requeues = attempt(5, "")
    assert (code, requeues) == (75, 5)
    assert "without a new completion" in text
    assert "--time=" in text


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
    host_only = (
        "CUDA_HOME", "CUDA_PATH", "CUDA_PATH_V12_8", "I_MPI_ROOT", "OMPI_PREFIX", "PRTE_PREFIX",
        "PMIX_INSTALL_PREFIX", "OMPI_MCA_mca_base_component_path", "OMPI_LIBDIR",
    )  # fmt: skip
    code, text = stand.run(
        "in_image.sh",
        "mpipipe",
        "run",
        MPIPIPE_IMAGE=str(image),
        MPIPIPE_NV="on",
        MPIPIPE_JOB_BINDS="/job,/m:/m:ro",
        PMI_RANK="3",
        PMIX_SERVER_TMPDIR=str(stand.model),
        PMIX_DSTORE_21_BASE_PATH="/spool/pmix",
        CUDA_VISIBLE_DEVICES="1",
        **dict.fromkeys(host_only, "/host"),
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
    assert "APPTAINERENV_PMIX_DSTORE_21_BASE_PATH=/spool/pmix" in passed
    names = {line.partition("=")[0] for line in passed if line.startswith("APPTAINERENV_")}
    for name in ("LD_LIBRARY_PATH", "PYTHONPATH", *host_only):
        assert f"APPTAINERENV_{name}" not in names, name


def bound_in_image(stand: Stand, model: Path) -> str:
    """How the image is called for a run of `model`."""
    image = stand.folder / "image.sif"
    image.touch()
    # The job's folder is there already: the stand-in for the image starts nothing that makes it.
    stand.job.mkdir(parents=True)
    (stand.job / "job.env").write_text(f"config=/c models=({model}) words=()\n")
    environ = {"MPIPIPE_IMAGE": str(image), "MPIPIPE_SRUN_MPI": "pmi2"}
    code, text = stand.run("run.sh", str(stand.job), **environ)
    assert code == 0, text
    return stand.asked("apptainer")[-1]


def test_a_model_below_a_link_is_bound_under_the_name_that_the_ranks_are_given(
    stand: Stand,
) -> None:
    alias = stand.folder / "alias"
    alias.symlink_to(stand.folder)
    call = bound_in_image(stand, alias / "model")
    real = f"--bind {stand.model}:{stand.model}:ro"
    own = f"--bind {stand.model}:{alias}/model:ro"
    assert 0 < call.index(real) < call.index(own), "its name may lead through what it points to"


def test_what_an_image_does_not_see_is_told_with_the_setting_that_shows_it(stand: Stand) -> None:
    image = stand.folder / "image.sif"
    image.touch()
    environ = {"MPIPIPE_IMAGE": str(image), "IMAGE_CODE": "4"}
    code, text = stand.run("run.sh", "configs/demo.toml", **environ)
    assert code == 4
    assert "MPIPIPE_BINDS" in text


def test_the_demo_model_is_found_in_an_image_where_caches_are_kept_elsewhere(stand: Stand) -> None:
    cache = stand.folder / "caches/mpipipe"
    cache.mkdir(parents=True)
    stand.environ["XDG_CACHE_HOME"] = str(cache.parent)
    assert f"--bind {cache}" in bound_in_image(stand, stand.model)
    assert f"APPTAINERENV_MPIPIPE_CACHE={cache}" in (stand.folder / "image.env").read_text()


def test_compiled_kernels_are_found_in_an_image(stand: Stand) -> None:
    kernels = stand.folder / "kernels"
    kernels.mkdir()
    stand.environ["TRITON_CACHE_DIR"] = str(kernels)
    assert f"--bind {kernels}" in bound_in_image(stand, stand.model)
    assert f"APPTAINERENV_TRITON_CACHE_DIR={kernels}" in (stand.folder / "image.env").read_text()


def test_a_model_folder_made_of_links_is_bound_with_what_they_point_to(stand: Stand) -> None:
    (stand.folder / "blobs").mkdir()
    (stand.folder / "blobs/1").touch()
    (stand.model / "config.json").symlink_to("../blobs/1")
    call = bound_in_image(stand, stand.model)
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


def test_the_library_example_takes_the_demo_model_where_none_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def opened(model: str) -> None:
        asked.append(model)
        raise InterruptedError

    monkeypatch.setattr(mpipipe, "Pipeline", opened)
    script = LAUNCH / "library_example.py"
    for words in ([], ["models/mine"]):
        monkeypatch.setattr(sys, "argv", [str(script), *words])
        with pytest.raises(InterruptedError):
            runpy.run_path(str(script), run_name="__main__")
    assert asked == ["demo:smollm2", "models/mine"]
