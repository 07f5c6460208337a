from __future__ import annotations

import os
from pathlib import Path

import pytest

from mpipipe.topology.host import (
    host_name,
    memory_available_bytes,
    peak_rss_bytes,
    read_host,
    usable_cores,
)

GIB = 2**30
V1_UNLIMITED = "9223372036854771712"


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def meminfo(available_gib: int) -> dict[str, str]:
    text = f"MemTotal:       99 kB\nMemAvailable:   {available_gib * 2**20} kB\n"
    return {"proc/meminfo": text}


def test_without_cgroups_the_affinity_mask_and_memavailable_count(tmp_path: Path) -> None:
    put(tmp_path, meminfo(5))
    assert usable_cores(tmp_path, affinity=6) == 6
    assert memory_available_bytes(tmp_path) == 5 * GIB


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8)],
)
def test_cpu_quota_of_cgroup_v2(tmp_path: Path, cpu_max: str, cores: int) -> None:
    put(tmp_path, {"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/cpu.max": cpu_max + "\n"})
    assert usable_cores(tmp_path, affinity=8) == cores


def test_a_limit_above_the_own_group_counts_too(tmp_path: Path) -> None:
    put(
        tmp_path,
        meminfo(64)
        | {
            "proc/self/cgroup": "0::/slurm/job_1/step_0\n",
            "sys/fs/cgroup/slurm/job_1/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/slurm/job_1/step_0/cpu.max": "max 100000\n",
            "sys/fs/cgroup/slurm/job_1/memory.max": str(8 * GIB),
            "sys/fs/cgroup/slurm/job_1/memory.current": str(3 * GIB),
            "sys/fs/cgroup/slurm/job_1/memory.stat": f"anon 1\ninactive_file {GIB}\n",
            "sys/fs/cgroup/slurm/job_1/step_0/memory.max": "max\n",
        },
    )
    assert usable_cores(tmp_path, affinity=8) == 3
    assert memory_available_bytes(tmp_path) == 6 * GIB


def test_container_that_sees_only_the_mount_itself(tmp_path: Path) -> None:
    put(
        tmp_path,
        meminfo(64)
        | {
            "proc/self/cgroup": "0::/docker/abc\n",
            "sys/fs/cgroup/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/memory.max": str(4 * GIB),
            "sys/fs/cgroup/memory.current": str(GIB),
        },
    )
    assert usable_cores(tmp_path, affinity=8) == 2
    assert memory_available_bytes(tmp_path) == 3 * GIB


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_limits_of_cgroup_v1(tmp_path: Path, mount: str) -> None:
    put(
        tmp_path,
        meminfo(64)
        | {
            "proc/self/cgroup": "9:name=systemd:/\n4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n",
            f"sys/fs/cgroup/{mount}/job/cpu.cfs_quota_us": "150000\n",
            f"sys/fs/cgroup/{mount}/job/cpu.cfs_period_us": "50000\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(2 * GIB),
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(GIB),
            "sys/fs/cgroup/memory/job/memory.stat": f"total_inactive_file {GIB // 2}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_UNLIMITED,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(60 * GIB),
        },
    )
    assert usable_cores(tmp_path, affinity=8) == 3
    assert memory_available_bytes(tmp_path) == 2 * GIB - GIB // 2


def test_no_quota_in_cgroup_v1_is_minus_one(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "proc/self/cgroup": "1:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert usable_cores(tmp_path, affinity=4) == 4


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    put(
        tmp_path,
        meminfo(64)
        | {
            "proc/self/cgroup": "0::/a\n",
            "sys/fs/cgroup/a/memory.max": str(GIB),
            "sys/fs/cgroup/a/memory.current": str(GIB + 4096),
        },
    )
    assert memory_available_bytes(tmp_path) == 0


def test_path_that_climbs_out_of_the_mount_is_harmless(tmp_path: Path) -> None:
    put(tmp_path, meminfo(1) | {"proc/self/cgroup": "0::/../../x\n"})
    assert usable_cores(tmp_path, affinity=2) == 2
    assert memory_available_bytes(tmp_path) == GIB


def test_peak_is_the_high_water_mark(tmp_path: Path) -> None:
    put(tmp_path, {"proc/self/status": "Name:\tx\nVmPeak:\t 99 kB\nVmHWM:\t  2048 kB\n"})
    assert peak_rss_bytes(tmp_path) == 2 * 2**20


def test_peak_falls_back_to_getrusage(tmp_path: Path) -> None:
    assert peak_rss_bytes(tmp_path) > 2**20


def test_this_host_has_plausible_facts() -> None:
    facts = read_host()
    assert facts.host == host_name()
    assert "." not in facts.host
    assert facts.host
    assert 1 <= facts.usable_cores <= (os.cpu_count() or 1)
    assert facts.memory_available_bytes > 2**20
