from __future__ import annotations

import os
from pathlib import Path

import pytest

from mpipipe.topology.host import (
    allowed_cpus,
    cpus_near,
    format_cpus,
    move_process,
    parse_cpus,
    usable_physical_cores,
)


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def siblings(*cores: str) -> dict[str, str]:
    """Files of a host whose cores have these CPUs."""
    return {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{core}\n"
        for core in cores
        for cpu in parse_cpus(core)
    }


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0-3,8\n", (0, 1, 2, 3, 8)), ("5", (5,)), ("", ()), ("\n", ()), ("none", ()), ("1-x", ())],
)
def test_lists_of_the_kernel_are_read(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize(
    ("cpus", "text"), [((3, 0, 1, 8, 1), "0-1,3,8"), ((), ""), ((0, 1, 2, 3), "0-3"), ((7,), "7")]
)
def test_cpus_are_written_as_the_kernel_writes_them(cpus: tuple[int, ...], text: str) -> None:
    assert format_cpus(cpus) == text


def test_cores_hold_their_hardware_threads(tmp_path: Path) -> None:
    put(tmp_path, siblings("0,4", "1,5", "2,6", "3,7"))
    assert usable_physical_cores(tmp_path, range(8)) == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_a_sibling_outside_of_the_mask_is_left_out(tmp_path: Path) -> None:
    put(tmp_path, siblings("0,4", "1,5", "2,6", "3,7"))
    assert usable_physical_cores(tmp_path, (1, 2, 6)) == ((1,), (2, 6))


def test_without_a_topology_every_cpu_is_a_core(tmp_path: Path) -> None:
    assert usable_physical_cores(tmp_path, (3, 1)) == ((1,), (3,))


def test_the_own_mask_is_read_by_default() -> None:
    cpus = {cpu for core in usable_physical_cores() for cpu in core}
    assert cpus == os.sched_getaffinity(0)


def test_a_job_may_use_its_cpuset_and_not_the_whole_host(tmp_path: Path) -> None:
    online = {"sys/devices/system/cpu/online": "0-63\n"}
    put(tmp_path, online)
    assert len(allowed_cpus(tmp_path)) == 64
    put(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/job/cpuset.cpus.effective": "8-15\n",
            "sys/fs/cgroup/cpuset.cpus.effective": "0-63\n",
        },
    )
    assert allowed_cpus(tmp_path) == tuple(range(8, 16))


def test_the_cpuset_of_cgroup_v1_counts_too(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "proc/self/cgroup": "4:cpuset:/slurm/job_1\n1:name=systemd:/x\n0::/x\n",
            "sys/fs/cgroup/cpuset/slurm/job_1/cpuset.effective_cpus": "2-3\n",
            "sys/devices/system/cpu/online": "0-63\n",
        },
    )
    assert allowed_cpus(tmp_path) == (2, 3)


def test_the_cpus_near_a_gpu_are_those_of_its_pci_device(tmp_path: Path) -> None:
    put(tmp_path, {"sys/bus/pci/devices/0000:3b:00.0/local_cpulist": "0-1,4-5\n"})
    assert cpus_near("0000:3B:00.0", tmp_path) == (0, 1, 4, 5)
    assert cpus_near("0000:af:00.0", tmp_path) == ()
    assert cpus_near("", tmp_path) == ()


def test_a_process_stays_where_it_is_when_the_kernel_refuses() -> None:
    before = os.sched_getaffinity(0)
    assert not move_process([1 << 14])
    assert os.sched_getaffinity(0) == before


def test_threads_that_run_already_move_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    moved: list[tuple[int, set[int]]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda who, cpus: moved.append((who, set(cpus))))
    put(tmp_path, {"proc/self/task/100/comm": "python", "proc/self/task/101/comm": "cuda"})
    assert move_process((4, 5), tmp_path)
    assert sorted(moved) == [(0, {4, 5}), (100, {4, 5}), (101, {4, 5})]
