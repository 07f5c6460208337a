"""`mpipipe doctor` on real ranks: a job in order, and jobs that would be lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.e2e.conftest import Outcome, execute, mpipipe


def doctor(num_ranks: int, *words: str, folder: Path, **environment: str) -> Outcome:
    command = mpipipe(num_ranks, "doctor", "--json", *words)
    return execute(command, folder, HF_HUB_OFFLINE="1", **environment)


def findings(outcome: Outcome) -> dict[str, list[dict[str, Any]]]:
    """By check."""
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(outcome.stdout)["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    return found


def test_two_ranks_and_their_job_are_examined(tiny_config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcome = doctor(2, str(tiny_config), f"output.dir={folder}", folder=folder)
    assert outcome.exit_code == 0, outcome.stdout + outcome.stderr
    document = json.loads(outcome.stdout)
    assert document["num_ranks"] == 2
    assert document["severity"] in {"ok", "warning"}
    found = findings(outcome)
    assert found["links.messages"][0]["values"]["round_trip_p50_us"] > 0
    assert found["links.edge"][0]["values"]["bandwidth_gb_s"] > 0
    assert found["links.idle"]
    assert "2 stages" in found["job.plan"][0]["what"]
    for check in ("job.model", "job.output", "job.memory", "job.prompts"):
        assert len(found[check]) == 1, check
    assert not folder.exists()  # looked at, not begun
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_job_that_would_be_lost_ends_all_ranks_with_its_exit_code(
    tiny_config: Path, tmp_path: Path
) -> None:
    absent = f"model.path={tmp_path / 'absent'}"
    outcome = doctor(2, str(tiny_config), absent, "--quick", folder=tmp_path)
    assert outcome.exit_code == 3, outcome.stdout + outcome.stderr
    (finding,) = findings(outcome)["job.model"]
    assert finding["severity"] == "fatal"
    assert "absent" in finding["what"]


def test_a_mistaken_configuration_is_a_finding_of_all_ranks(
    tiny_config: Path, tmp_path: Path
) -> None:
    outcome = doctor(2, str(tiny_config), "pipeline.num_slots=-1", "--quick", folder=tmp_path)
    assert outcome.exit_code == 2, outcome.stdout + outcome.stderr
    assert len(findings(outcome)["job.config"]) == 1


def test_a_run_that_is_in_the_way_is_told_before_the_job(tiny_config: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    words = (str(tiny_config), f"output.dir={tmp_path}", "--quick")
    outcome = doctor(0, *words, folder=tmp_path)
    assert outcome.exit_code == 2
    told = findings(outcome)["job.output"]
    assert any("already holds a run" in finding["what"] for finding in told)
    assert doctor(0, *words, "output.resume=true", folder=tmp_path).exit_code == 0


def test_ranks_that_mpi_leaves_alone_are_told_which_flag_fits(tmp_path: Path) -> None:
    """As under `srun --mpi=none`: Slurm says two tasks, MPI knows of one."""
    step = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0",
        "SLURM_MPI_TYPE": "none",
    }
    tasks = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    outcome = doctor(0, "--quick", folder=tmp_path, **step, **tasks)
    assert outcome.exit_code == 5, outcome.stdout + outcome.stderr
    (finding,) = findings(outcome)["launch.mpi"]
    assert "each is alone" in finding["what"]
    assert "srun --mpi=pm" in finding["remedy"]
