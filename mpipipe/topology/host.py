"""What this process may use of its host: cores, memory, name; and what it has used.

Containers and Slurm limit a job through cgroups, and no library call tells: both versions are read
here, for the process's own group and every group above it. `planning` shares them between ranks.
Every reader takes the root folder, so tests give it a fake one. Linux only; a file that is missing
means "no limit", and of CPUs "unknown". `planning.layout` decides which rank gets which cores.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Core",
    "HostFacts",
    "allowed_cpus",
    "cgroup_folders",
    "cpus_near",
    "format_cpus",
    "host_name",
    "memory_available_bytes",
    "memory_limit_bytes",
    "move_process",
    "num_oom_kills",
    "parse_cpus",
    "peak_rss_bytes",
    "read_host",
    "read_text",
    "usable_cores",
    "usable_physical_cores",
]

_ROOT = Path("/")

Core = tuple[int, ...]  # the CPUs (hardware threads) that it offers, lowest first


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What planning needs to know about the host of one rank."""

    host: str
    usable_cores: int
    memory_available_bytes: int


def read_host() -> HostFacts:
    """The facts of this process now."""
    return HostFacts(host_name(), usable_cores(), memory_available_bytes())


def host_name() -> str:
    """The node's name without its domain, as Slurm writes it."""
    return os.uname().nodename.split(".")[0]


def usable_cores(root: Path = _ROOT, affinity: int | None = None) -> int:
    """Cores this process can keep busy: its affinity mask, or a CPU quota if less; at least 1.

    `affinity` replaces the size of the mask in tests.
    """
    cores = affinity if affinity is not None else len(os.sched_getaffinity(0))
    for group in cgroup_folders(root, "cpu"):
        quota, period = _cpu_quota(group)
        if quota > 0 and period > 0:
            cores = min(cores, quota // period)
    return max(1, cores)


def memory_available_bytes(root: Path = _ROOT) -> int:
    """Bytes that can still be allocated: MemAvailable, less by what the cgroups leave.

    Page cache that a group can drop (`inactive_file`) counts as free, as Kubernetes counts it.
    """
    available = _stat(root / "proc/meminfo", "MemAvailable") * 1024
    for group in cgroup_folders(root, "memory"):
        limit, usage, cache = _memory_use(group)
        if limit is not None:
            available = min(available, max(0, limit - max(0, usage - cache)))
    return available


def memory_limit_bytes(root: Path = _ROOT) -> int | None:
    """The tightest memory limit of the cgroups; None without one below the host's memory."""
    limits = [_memory_use(group)[0] for group in cgroup_folders(root, "memory")]
    total = _stat(root / "proc/meminfo", "MemTotal") * 1024
    return min((limit for limit in limits if limit is not None and limit < total), default=None)


def num_oom_kills(root: Path = _ROOT) -> int:
    """Processes of the own cgroup, or of groups below it, that were killed for lack of memory."""
    group = next(cgroup_folders(root, "memory"), root / "nowhere")
    return _stat(group / "memory.events", "oom_kill") or _stat(
        group / "memory.oom_control", "oom_kill"
    )


def peak_rss_bytes(root: Path = _ROOT) -> int:
    """The largest resident size of this process so far.

    VmHWM first: `ru_maxrss` starts at the size of the process that forked this one.
    """
    peak_kib = _stat(root / "proc/self/status", "VmHWM")
    return 1024 * (peak_kib or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the process's groups for `controller`, own first, then those above; v2 and v1."""
    base = root / "sys/fs/cgroup"
    for line in read_text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            yield from _upwards(base, path)
            yield from _upwards(base / "unified", path)
        elif controller in controllers.split(","):
            mounts = dict.fromkeys((controllers, controller))  # "cpu,cpuacct" and its link "cpu"
            for mount in mounts:
                yield from _upwards(base / mount, path)


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """`mount/path` and each folder above it up to `mount`; folders that do not exist are harmless.

    In a container the path is often the host's and only `mount` itself is there.
    """
    group = mount / path.strip("/")
    yield group
    while group != mount and mount in group.parents:
        group = group.parent
        yield group


def _cpu_quota(group: Path) -> tuple[int, int]:
    """Microseconds of CPU per period, and the period; (-1, 0) without a limit."""
    words = read_text(group / "cpu.max").split()
    if len(words) == 2:
        return (-1, 0) if words[0] == "max" else (int(words[0]), int(words[1]))
    quota = _integer(group / "cpu.cfs_quota_us")
    period = _integer(group / "cpu.cfs_period_us")
    return (-1, 0) if quota is None or period is None else (quota, period)


def _memory_use(group: Path) -> tuple[int | None, int, int]:
    """Limit (None: none), usage and droppable page cache of a group, in bytes."""
    limit = _integer(group / "memory.max")
    if limit is not None:
        usage = _integer(group / "memory.current") or 0
        return limit, usage, _stat(group / "memory.stat", "inactive_file")
    limit = _integer(group / "memory.limit_in_bytes")
    usage = _integer(group / "memory.usage_in_bytes") or 0
    return limit, usage, _stat(group / "memory.stat", "total_inactive_file")


def read_text(path: Path) -> str:
    """What is in a file of the kernel; empty where it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _integer(path: Path) -> int | None:
    text = read_text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _stat(path: Path, key: str) -> int:
    """The number of a `key 123` or `Key:   123 kB` line; 0 when there is none."""
    found = re.search(rf"^{key}:?\s+(\d+)", read_text(path), re.MULTILINE)
    return int(found[1]) if found else 0


# ---- CPUs, one by one ----------------------------------------------------------------------------


def parse_cpus(text: str) -> tuple[int, ...]:
    """The numbers of a kernel list such as `0-3,8`; none when it is no such list."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        if not (first.isdigit() and (last or first).isdigit()):
            return ()
        found.extend(range(int(first), int(last or first) + 1))
    return tuple(found)


def format_cpus(cpus: Iterable[int]) -> str:
    """The inverse of `parse_cpus`, in order and without repeats."""
    spans: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if spans and spans[-1][-1] == cpu - 1:
            spans[-1] = [spans[-1][0], cpu]
        else:
            spans.append([cpu])
    return ",".join("-".join(map(str, span)) for span in spans)


def usable_physical_cores(
    root: Path = _ROOT, affinity: Iterable[int] | None = None
) -> tuple[Core, ...]:
    """The cores of the affinity mask in order, each with those of its CPUs that are in the mask.

    `affinity` replaces the mask in tests.
    """
    mask = sorted(os.sched_getaffinity(0) if affinity is None else affinity)
    cores: dict[Core, None] = {}
    for cpu in mask:
        file = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        siblings = set(parse_cpus(read_text(file))) | {cpu}
        cores[tuple(sibling for sibling in mask if sibling in siblings)] = None
    return tuple(cores)


def allowed_cpus(root: Path = _ROOT) -> tuple[int, ...]:
    """The CPUs that the job may use here: its cpuset, or else all that are online.

    More than the affinity mask where a launcher has bound this process to a part of them.
    """
    for group in cgroup_folders(root, "cpuset"):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            if cpus := parse_cpus(read_text(group / name)):
                return cpus
    return parse_cpus(read_text(root / "sys/devices/system/cpu/online"))


def cpus_near(pci_address: str, root: Path = _ROOT) -> tuple[int, ...]:
    """The CPUs of the NUMA node that a PCI device hangs on, e.g. of `0000:3b:00.0`.

    Where the kernel knows no node these are all CPUs of the host.
    """
    if not pci_address:
        return ()
    folder = root / "sys/bus/pci/devices" / pci_address.lower()
    return parse_cpus(read_text(folder / "local_cpulist"))


def move_process(cpus: Iterable[int], root: Path = _ROOT) -> bool:
    """Bind every thread of this process, and all that it will start, to `cpus`.

    Every thread, as MPI and CUDA have started theirs before the GPU is known. False: the kernel
    refused, as when the CPUs are outside of the job's own.
    """
    wanted = set(cpus)
    try:
        threads = [int(entry.name) for entry in (root / "proc/self/task").iterdir()]
    except OSError:
        threads = [0]
    try:
        os.sched_setaffinity(0, wanted)
    except OSError:
        return False
    for thread in threads:
        try:
            os.sched_setaffinity(thread, wanted)
        except OSError:  # it has ended meanwhile
            continue
    return True
