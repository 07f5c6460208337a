from __future__ import annotations

import pytest

from mpipipe.topology.slurm import job_record, meaning_of_end, sbatch_options

# Slurm 22.05; the newer versions' way of writing resources is in the tests.
RECORD = """\
JobId=12 JobName=mpipipe UserId=ann(1000) GroupId=ann(1000) MCS_label=N/A Account=physics QOS=normal
   JobState=RUNNING Reason=None Dependency=(null) RunTime=00:00:02 TimeLimit=01:00:00 TimeMin=N/A
   Partition=gpu AllocNode:Sid=head:1 NodeList=n[1-2] NumNodes=2 NumCPUs=4 NumTasks=2 CPUs/Task=2
   NtasksPerN:B:S:C=1:0:*:* CoreSpec=* MinCPUsNode=2 MinMemoryNode=0 MinTmpDiskNode=0
   Features=(null) Command=/home/ann/my project/launch/submit.sbatch configs/x.toml
   WorkDir=/home/ann/my project StdOut=/home/ann/my project/mpipipe-12.log Power=
   TresPerNode=gres:gpu:1
"""


def test_a_record_is_read_with_spaces_in_its_values_and_without_what_is_null() -> None:
    record = job_record(RECORD)
    assert record["StdOut"] == "/home/ann/my project/mpipipe-12.log"
    assert record["Command"].endswith("submit.sbatch configs/x.toml")
    assert record["NtasksPerN:B:S:C"] == "1:0:*:*"
    assert "Dependency" not in record
    assert job_record("slurm_load_jobs error: Invalid job id specified") == {}


def test_what_submit_sbatch_asks_for_anyway_is_not_repeated() -> None:
    assert sbatch_options(job_record(RECORD)) == ["--account=physics", "--partition=gpu"]


@pytest.mark.parametrize(
    ("old", "new", "option"),
    [
        ("TresPerNode=gres:gpu:1", "", "--gres=none"),
        ("TresPerNode=gres:gpu:1", "TresPerNode=gres/gpu:t4:4", "--gres=gpu:t4:4"),
        ("TresPerNode=gres:gpu:1", "TresPerTask=gres/gpu:1", "--gpus-per-task=1"),
        ("TresPerNode=gres:gpu:1", "TresPerJob=gres:gpu:8", "--gpus=8"),
        ("NumNodes=2", "NumNodes=4", "--nodes=4"),
        ("TimeLimit=01:00:00", "TimeLimit=1-00:00:00", "--time=1-00:00:00"),
        ("S:C=1:0", "S:C=4:0", "--ntasks-per-node=4"),
        ("CPUs/Task=2", "CPUs/Task=8", "--cpus-per-task=8"),
        ("MinMemoryNode=0", "MinMemoryNode=16G", "--mem=16G"),
        ("MinMemoryNode=0", "MinMemoryCPU=2G", "--mem-per-cpu=2G"),
        ("QOS=normal", "QOS=long", "--qos=long"),
    ],
)
def test_what_the_job_had_beyond_that_is_repeated(old: str, new: str, option: str) -> None:
    assert option in sbatch_options(job_record(RECORD.replace(old, new)))


def test_a_record_that_says_nothing_makes_no_options() -> None:
    assert sbatch_options({}) == []
    assert sbatch_options(job_record(RECORD.replace("gpu:1", "$(reboot)"))) == [
        "--account=physics",
        "--partition=gpu",
    ]


@pytest.mark.parametrize(
    ("state", "exit_code", "meaning"),
    [
        ("OUT_OF_MEMORY", "0:125", "--mem="),
        ("TIMEOUT", "0:0", "--time="),
        ("NODE_FAIL", "0:0", "node"),
        ("CANCELLED by 1000", "0:15", "scancel"),
        ("FAILED", "6:0", "a rank was lost"),
        ("FAILED", "2:0", "configuration"),
        ("FAILED", "137:0", "SIGKILL"),
        ("FAILED", "0:9", "SIGKILL"),
        ("FAILED", "130:0", "interrupted"),
        ("FAILED", "139:0", "SIGSEGV"),
    ],
)
def test_an_end_is_told_in_words(state: str, exit_code: str, meaning: str) -> None:
    assert meaning in meaning_of_end(state, exit_code)


@pytest.mark.parametrize("exit_code", ["0:0", "", ":", "x:y", "1:²", "9" * 5000 + ":0", "77:0"])
def test_an_exit_code_that_says_nothing_is_not_explained(exit_code: str) -> None:
    assert meaning_of_end("FAILED", exit_code) == ""
