"""Which GPU a rank takes, and what is said when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpipipe.topology.gpu import (
    container_kind,
    cuda_init_problem,
    driver_in_sight,
    gpu_of_rank,
    mig_slice,
    no_driver_problem,
    pci_address,
    told_local_rank,
)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, 1),
        ({"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "1"}, 1),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, 1),
        ({"PMIX_RANK": "3", "PMIX_LOCAL_RANK": "1"}, 1),
        ({"PMI_RANK": "3", "PALS_LOCAL_RANKID": "1"}, 1),
        ({}, None),
        ({"SLURM_LOCALID": "0"}, None),  # of a batch script, whose child this is
    ],
)
def test_the_local_rank_is_what_the_launcher_says_else_unknown(
    environ: dict[str, str], expected: int | None
) -> None:
    assert told_local_rank(environ) == expected


def test_ranks_of_a_host_take_one_gpu_each_in_order() -> None:
    assert [gpu_of_rank(rank, 2) for rank in range(4)] == [0, 1, 0, 1]
    assert [gpu_of_rank(rank, 1) for rank in range(2)] == [0, 0]


def test_a_driver_is_in_sight_when_its_device_file_is(tmp_path: Path) -> None:
    assert not driver_in_sight(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert driver_in_sight(tmp_path)


def test_a_container_is_known_by_its_environment_or_its_files(tmp_path: Path) -> None:
    assert container_kind({}, tmp_path) == ""
    assert container_kind({"APPTAINER_CONTAINER": "/x.sif"}, tmp_path) == "apptainer"
    assert container_kind({"SINGULARITY_NAME": "x.sif"}, tmp_path) == "apptainer"
    (tmp_path / ".dockerenv").touch()
    assert container_kind({}, tmp_path) == "docker"
    (tmp_path / ".singularity.d").mkdir()
    assert container_kind({}, tmp_path) == "apptainer"


def test_a_missing_driver_is_put_down_to_the_container_if_there_is_one(tmp_path: Path) -> None:
    inside = no_driver_problem({"APPTAINER_CONTAINER": "/x.sif"}, tmp_path)
    assert inside.startswith("no NVIDIA driver visible in this container: start it with --nv")
    outside = no_driver_problem({}, tmp_path)
    assert "on this host" in outside
    assert "--nv" not in outside
    (tmp_path / ".dockerenv").touch()
    assert "--gpus all" in no_driver_problem({}, tmp_path)


@pytest.mark.parametrize(
    ("message", "environ", "expected"),
    [
        (
            "The NVIDIA driver on your system is too old (found version 12040). Please update",
            {},
            "which was built for CUDA 13.0, while the driver offers CUDA 12.4: update the driver",
        ),
        ("Found no NVIDIA driver on your system.", {}, "no NVIDIA driver is visible on this host"),
        ("No CUDA GPUs are available", {"CUDA_VISIBLE_DEVICES": ""}, 'DEVICES = "" leaves this'),
        ("No CUDA GPUs are available", {"CUDA_VISIBLE_DEVICES": "7"}, 'DEVICES = "7" leaves this'),
        ("No CUDA GPUs are available", {}, "the NVIDIA driver is there but shows no GPU"),
        (
            "CUDA error: system not yet initialized\nCUDA kernel errors might …",
            {},
            "CUDA could not be started (CUDA error: system not yet initialized): see whether",
        ),
    ],
)
def test_what_torch_says_becomes_one_sentence_with_the_remedy(
    message: str, environ: dict[str, str], expected: str, tmp_path: Path
) -> None:
    problem = cuda_init_problem(message, "13.0", environ, tmp_path)
    assert expected in problem
    assert "\n" not in problem


def test_a_slice_of_a_gpu_is_known_by_its_name_in_the_environment() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "MIG-1a, MIG-2b"}
    assert [mig_slice(environ, index) for index in range(3)] == ["MIG-1a", "MIG-2b", ""]
    assert mig_slice({"CUDA_VISIBLE_DEVICES": "GPU-1a"}, 0) == ""
    assert mig_slice({"CUDA_VISIBLE_DEVICES": "0,1"}, 1) == ""
    assert mig_slice({}, 0) == ""


def test_the_driver_tells_where_a_gpu_is_plugged_in(tmp_path: Path) -> None:
    for address, uuid in (("0000:3b:00.0", "GPU-aa-1"), ("0000:af:00.0", "GPU-bb-2")):
        folder = tmp_path / "proc/driver/nvidia/gpus" / address
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t T4\nGPU UUID: \t {uuid}\n")
    assert pci_address("BB-2", tmp_path) == "0000:af:00.0"
    assert pci_address("cc-3", tmp_path) == ""
    assert pci_address("", tmp_path) == ""
    assert pci_address("aa-1", tmp_path / "elsewhere") == ""
