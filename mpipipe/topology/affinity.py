"""Which CPUs this process may use, which are near its GPU, and moving the process there.

A core is a tuple of the CPUs (hardware threads) that it offers, lowest first. `planning.layout`
decides which rank gets which cores. Every reader takes the root folder, so tests give it a fake
one. Linux only; what cannot be read is empty, which means "unknown".
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mpipipe.topology.host import cgroup_folders, read_text

__all__ = [
    "Core",
    "allowed_cpus",
    "cpus_near",
    "format_cpus",
    "move_process",
    "parse_cpus",
    "usable_physical_cores",
]

_ROOT = Path("/")

Core = tuple[int, ...]


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
