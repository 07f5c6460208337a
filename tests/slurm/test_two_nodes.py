"""Over two nodes: the same tokens with either MPI, through the network; wrong flags are named."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from tests.slurm.scenarios import (
    MpiMismatch,
    cyclic,
    demo_alone,
    demo_in_image,
    demo_on_two_nodes,
    dense_memory,
    doctor_on_two_nodes,
    tiny_alone,
    wrong_mpi,
)
from tests.slurm.site import JobEnd

story = pytest.mark.story.with_args  # a marker with one function would decorate it

# Eight prompts of 17 tokens and 24 new ones: as many hidden states of 576 float32 leave stage 0,
# but for a page of 16 tokens with which a prompt begins as another does.
HIDDEN_BYTES = (8 * (17 + 23) - 16) * 576 * 4


@story(demo_alone)
def test_one_process_completes_the_demo(end: dict[str, list[int]]) -> None:
    assert len(end) == 8
    assert all(end.values())


@pytest.mark.parametrize(
    ("flag", "library"),
    [
        pytest.param("pmi2", "MPICH", marks=story(demo_on_two_nodes, "mpich")),
        pytest.param("pmix", "Open MPI", marks=story(demo_on_two_nodes, "openmpi")),
    ],
    ids=["mpich-pmi2", "openmpi-pmix"],
)
def test_sbatch_of_the_demo_makes_the_tokens_of_one_process_over_the_network(
    flag: str, library: str, end: JobEnd, told: Callable[..., Any]
) -> None:
    assert end.state == "COMPLETED", end.log
    assert end.tokens() == told(demo_alone)
    assert f"srun --mpi={flag}" in end.log
    manifest = json.dumps(end.json("manifest.json"))
    assert library in manifest
    assert '"n1"' in manifest
    assert '"n2"' in manifest
    assert end.observed["bytes"] > HIDDEN_BYTES
    assert {path.name for path in end.folder.iterdir()} >= {"config", "prompts", "outputs"}
    accounts = (end.folder / "outputs" / f"sacct_{end.job_id}.txt").read_text()
    assert accounts.startswith("JobID|State|")
    assert f"\n{end.job_id}.0|COMPLETED|0:0|" in accounts


@story(demo_in_image)
def test_the_same_tokens_come_out_of_a_container_on_both_nodes(
    end: JobEnd, told: Callable[..., Any]
) -> None:
    assert end.state == "COMPLETED", end.log
    assert end.tokens() == told(demo_alone)
    assert "/opt/mpipipe/venv/lib/libmpi.so" in end.log  # the image's MPI, not the host's
    assert len({host["host"] for host in end.json("manifest.json")["hosts"]}) == 2


@story(cyclic)
def test_ranks_dealt_round_the_nodes_make_stages_that_follow_each_other_on_a_node(
    end: JobEnd, told: Callable[..., Any]
) -> None:
    alone = told(tiny_alone)
    assert end.tokens() == {name: alone[name] for name in ("p0", "p1", "p2")}
    assert re.search(r"pipeline\.layout\W+n\d: ranks 0 2 \| n\d: ranks 1 3\b", end.log), end.log
    assert "1 of 3 edges between hosts" in end.log


MISMATCHES = [("mpich", "none"), ("mpich", "pmix"), ("openmpi", "none"), ("openmpi", "pmi2")]


@pytest.mark.parametrize(
    "mpi",
    [pytest.param(m, marks=story(wrong_mpi, m, f), id=f"{m}-{f}") for m, f in MISMATCHES],
)
def test_a_wrong_mpi_flag_fails_at_once_and_the_right_one_is_named(
    mpi: str, end: MpiMismatch
) -> None:
    assert end.exit_code != 0
    assert "mpipipe: error:" in end.said
    assert f"srun --mpi={'pmi2' if mpi == 'mpich' else 'pmix'}" in end.said


@story(dense_memory)
def test_mpich_starts_under_pmi2_whatever_lies_in_memory(
    end: subprocess.CompletedProcess[str],
) -> None:
    assert end.returncode == 0, end.stderr
    assert sorted(end.stdout.split("\n")) == ["", "rank 0 of 2", "rank 1 of 2"]
    assert "mpi/pmi2" not in end.stderr


@story(doctor_on_two_nodes, "openmpi", "pmix")
def test_the_doctor_examines_both_nodes_under_srun(
    end: subprocess.CompletedProcess[str],
) -> None:
    assert end.returncode == 0, end.stdout + end.stderr
    report = json.loads(end.stdout)
    assert len(report["hosts"]) == 2
    findings = {finding["check"]: finding for finding in report["findings"]}
    assert "fatal" not in {finding["severity"] for finding in report["findings"]}
    assert {"launch.mpi", "links.messages", "links.edge", "job.plan"} <= set(findings)


@story(doctor_on_two_nodes, "mpich", "none")
def test_the_doctor_names_a_wrong_mpi_flag_before_srun_ends_it(
    end: subprocess.CompletedProcess[str],
) -> None:
    """Under --kill-on-bad-exit: the ranks that are alone let the first one speak."""
    assert end.returncode != 0
    (finding,) = json.loads(end.stdout)["findings"]
    assert finding["check"] == "launch.mpi"
    assert "srun --mpi=pmi2" in finding["remedy"]


@story(demo_on_two_nodes, "mpich")
def test_the_doctor_speaks_before_the_model_is_loaded(end: JobEnd) -> None:
    doctor, run = end.log.index("links.edge"), end.log.index("\nplan ")
    assert doctor < run
    assert "0 fatal" in end.log
