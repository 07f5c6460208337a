"""Reads what the doctor wants to know of this host: memory, limits, tools. No torch, no MPI.

Readers take the root folder, the environment and PATH lookups, so that tests fake them.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from mpipipe.doctor.facts import NodeFacts
from mpipipe.doctor.probes.folders import free_space_bytes
from mpipipe.topology.gpu import container_kind
from mpipipe.topology.host import (
    memory_available_bytes,
    memory_limit_bytes,
    num_oom_kills,
    read_text,
    usable_cores,
)

__all__ = ["PROFILERS", "probe_node"]

PROFILERS = ("nsys", "ncu", "perf", "py-spy")
_ROOT = Path("/")


def probe_node(
    environ: Mapping[str, str],
    root: Path = _ROOT,
    which: Callable[[str], str | None] = shutil.which,
) -> NodeFacts:
    """The host of this process now."""
    return NodeFacts(
        num_cores=usable_cores(root),
        memory_available=memory_available_bytes(root),
        memory_limit=memory_limit_bytes(root),
        oom_kills=num_oom_kills(root),
        shm_free=_free_bytes(root / "dev/shm"),
        memlock=_soft_limit(resource.RLIMIT_MEMLOCK),
        max_open_files=_soft_limit(resource.RLIMIT_NOFILE),
        container=container_kind(environ, root),
        infiniband=_has_entries(root / "sys/class/infiniband"),
        default_route=_has_default_route(root),
        profilers=tuple(name for name in PROFILERS if which(name)),
        sacct=which("sacct") is not None,
    )


def _free_bytes(folder: Path) -> int | None:
    """Of a file system that we may write to; -1: it has no limit, as a tmpfs of size 0."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    free = free_space_bytes(found)
    return -1 if free is None else free


def _soft_limit(which: int) -> int:
    limit = resource.getrlimit(which)[0]
    return -1 if limit == resource.RLIM_INFINITY else limit


def _has_entries(folder: Path) -> bool:
    try:
        return next(folder.iterdir(), None) is not None
    except OSError:
        return False


def _has_default_route(root: Path) -> bool:
    """Whether packets can leave the cluster's network at all; True where the kernel does not say.

    /proc/net/route: the second column is the destination in hex, the eighth its mask. In
    /proc/net/ipv6_route it is the first and the second, and "lo" stands for "unreachable".
    """
    v4 = read_text(root / "proc/net/route").splitlines()
    v6 = read_text(root / "proc/net/ipv6_route").splitlines()
    if not v4 and not v6:
        return True
    words4 = [line.split() for line in v4[1:]]
    words6 = [line.split() for line in v6]
    return any(w[1] == "00000000" and w[7] == "00000000" for w in words4 if len(w) > 7) or any(
        w[0] == "0" * 32 and w[1] == "00" and w[-1] != "lo" for w in words6 if w
    )
