"""The report: its exit code, its JSON, its lines; and a doctor that meets no torch and no MPI."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console

from mpipipe.cli.doctor import doctor_command, print_report
from mpipipe.clock import MonotonicClock
from mpipipe.doctor.examine import LAST_WORD_S, run_doctor
from mpipipe.doctor.finding import (
    DoctorReport,
    Finding,
    Severity,
    fatal,
    ok,
    split_advice,
    warning,
)
from mpipipe.errors import CheckpointError, EnvironmentSetupError


def report(*findings: Finding, num_ranks: int = 4) -> DoctorReport:
    return DoctorReport(findings, num_ranks, ("n0", "n1"), 1.25)


def printed(shown: DoctorReport, *, terminal: bool = False, width: int = 80) -> str:
    stream = io.StringIO()
    print_report(shown, Console(file=stream, force_terminal=terminal, width=width, no_color=True))
    return stream.getvalue()


def on(finding: Finding, rank: int, host: str) -> Finding:
    return dataclasses.replace(finding, rank=rank, host=host)


def test_the_exit_code_is_that_of_the_first_fatal_finding() -> None:
    fine = ok("a.b", "x")
    model = Finding.of_error("job.model", CheckpointError("gone: copy it again"))
    gpu = fatal("gpu.driver", "x", "y", "z")
    assert report(fine, warning("a.c", "x", "y", "z")).exit_code == 0
    assert report(fine, model, gpu).exit_code == 3
    assert report(fine, gpu, model).exit_code == 5


@pytest.mark.parametrize(
    ("sentence", "parts"),
    [
        ("no x: write y z", ("no x", "write y z")),
        ("no x (MPICH Version: 5.0.2); use pmi2", ("no x (MPICH Version: 5.0.2); use pmi2", "")),
        ("no x (a: b c): do so and: so", ("no x (a: b c)", "do so and: so")),
        ("no address of host: n1", ("no address of host: n1", "")),
    ],
)
def test_an_errors_advice_is_told_from_what_happened(sentence: str, parts: tuple[str, str]) -> None:
    assert split_advice(sentence) == parts


def test_the_report_in_json_has_what_the_guide_says() -> None:
    finding = on(warning("a.b", "what", "why", "do", num_x=3), 2, "n1")
    document = json.loads(json.dumps(report(finding).to_dict()))
    assert document.pop("findings") == [
        {
            "check": "a.b",
            "severity": "warning",
            "what": "what",
            "cause": "why",
            "remedy": "do",
            "rank": 2,
            "host": "n1",
            "values": {"num_x": 3},
            "exit_code": 5,
        }
    ]
    assert document == {
        "severity": "warning",
        "exit_code": 0,
        "num_ranks": 4,
        "hosts": ["n0", "n1"],
        "elapsed_s": 1.25,
    }


def test_what_is_ok_takes_one_line_and_the_rest_tells_cause_and_remedy() -> None:
    lines = printed(report(ok("a.b", "fine"), fatal("a.c", "bad", "this", "that"))).splitlines()
    assert lines[0].split() == ["ok", "a.b", "fine"]
    assert [line.split(maxsplit=0)[0].strip() for line in lines[2:4]] == [
        "cause: this",
        "remedy: that",
    ]
    assert "lost" in lines[-1]
    assert "1 ok, 0 warning, 1 fatal" in lines[-1]


def test_what_all_ranks_share_is_said_once_and_the_rest_names_its_ranks() -> None:
    same = ok("gpu.torch", "T4")
    odd = ok("gpu.torch", "V100")
    ranks = [on(same, 0, "n0"), on(same, 1, "n0"), on(same, 2, "n1"), on(odd, 3, "n1")]
    lines = printed(report(*ranks)).splitlines()
    assert len(lines) == 3
    assert "ranks 0–2: T4" in lines[0]
    assert "rank 3 on n1: V100" in lines[1]
    assert printed(report(*ranks[:3], num_ranks=3)).count("rank") == 0


def test_groups_stay_together() -> None:
    findings = [ok("a.x", "1"), ok("b.x", "2"), ok("a.y", "3")]
    checks = [line.split()[1] for line in printed(report(*findings)).splitlines()[:3]]
    assert checks == ["a.x", "a.y", "b.x"]


def test_long_lines_are_wrapped_on_a_terminal_only() -> None:
    long = report(ok("a.b", "word " * 40))
    assert len(printed(long).splitlines()) == 2
    lines = printed(long, terminal=True, width=60).splitlines()
    assert len(lines) > 3
    assert max(map(len, lines[:-1])) <= 75  # escape codes included


# ---- alone ---------------------------------------------------------------------------------------


def visit(config: Path | None = None, *words: str) -> tuple[DoctorReport | None, int]:
    return asyncio.run(run_doctor(config, words, MonotonicClock(), quick=True, debug=False))


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("SLURM_STEP_ID", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_single_process_gets_a_report(no_launcher: pytest.MonkeyPatch) -> None:
    found, exit_code = visit()
    assert found is not None
    assert found.num_ranks == 1
    assert exit_code == found.exit_code
    assert {"launch", "software", "node", "gpu"} <= {f.group for f in found.findings}


def test_ranks_that_are_alone_in_mpi_are_told_by_the_first_of_them_only(
    no_launcher: pytest.MonkeyPatch,
) -> None:
    error = EnvironmentSetupError(
        "srun started 2 ranks, but each is alone in MPI: use srun --mpi=x"
    )

    def raise_it(*_: object) -> None:
        raise error

    async def no_facts(*_: object) -> None:
        raise AssertionError("the first rank may be ended while it imports torch")

    no_launcher.setattr("mpipipe.runtime.ranks._open_channel", raise_it)
    no_launcher.setattr("mpipipe.doctor.examine._collect_facts", no_facts)
    environ = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_END_TIME": "99999999999"}
    for name, value in (environ | {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}).items():
        no_launcher.setenv(name, value)
    found, exit_code = visit()
    assert exit_code == 5
    assert found is not None
    assert found.findings[0].check == "launch.mpi"
    assert found.findings[0].severity is Severity.FATAL
    no_launcher.setenv("SLURM_PROCID", "1")
    limits = []

    def timeout(seconds: float) -> asyncio.Timeout:
        """As asyncio's; srun's signal comes as soon as the rank waits."""
        limits.append(seconds)
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
        return asyncio.Timeout(asyncio.get_running_loop().time() + seconds)

    no_launcher.setattr("mpipipe.doctor.examine.asyncio.timeout", timeout)
    assert visit() == (None, 5)
    assert limits == [LAST_WORD_S]  # or srun would end the rank that speaks


def test_the_json_is_all_that_is_printed(
    no_launcher: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    absent = tmp_path / "absent.toml"
    exit_code = doctor_command(absent, [], as_json=True, quick=True, debug=False)
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == exit_code != 0
    (finding,) = [f for f in document["findings"] if f["check"] == "job.config"]
    assert "absent.toml" in finding["what"]
    assert finding["exit_code"] == 2
