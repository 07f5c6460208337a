"""Checks the folder of `memory.offload_dir` on every host. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpipipe.doctor.finding import Finding, fatal, ok, warning
from mpipipe.doctor.probes.folders import FolderFacts
from mpipipe.errors import EXIT_ENVIRONMENT
from mpipipe.planning.memory import gib

__all__ = ["check_offload"]

_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_NETWORK = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "gfs2", "gpfs", "glusterfs", "lustre", "nfs", "nfs4",
     "orangefs", "panfs", "pvfs2", "smb3", "virtiofs", "wekafs"}
)  # fmt: skip
_SLOW_BYTES_PER_S = 0.2e9  # a hard disk; a layer of a 7B model takes two seconds
_REMEDY = (
    "give memory.offload_dir a folder on a disk of the node itself that you may write to, such as "
    "$TMPDIR where the site has one"
)


def check_offload(folders: Sequence[FolderFacts], needed_bytes: Mapping[str, int]) -> list[Finding]:
    """By host, where a folder is configured.

    Args:
        folders: one per host.
        needed_bytes: what the plan keeps there, by host; empty: there is no plan.
    """
    return [
        _offload(facts, needed_bytes.get(facts.host, 0)).at(facts.host)
        for facts in folders
        if facts.offload
    ]


def _offload(facts: FolderFacts, needed_bytes: int) -> Finding:
    where = f"{facts.offload} ({facts.offload_system or 'unknown file system'})"
    # What no weights go to hinders no run.
    unfit = fatal if needed_bytes else warning
    exit_code = {"exit_code": EXIT_ENVIRONMENT} if needed_bytes else {}
    if facts.offload_problem:
        what = f"{where} cannot be used for offloaded weights: {facts.offload_problem}"
        cause = "no such folder can be made there, no permission, or a read-only mount"
        return unfit("job.offload", what, cause, _REMEDY, **exit_code)
    free_bytes = facts.offload_free_bytes
    need = f"{gib(needed_bytes)} of weights are to stand there" if needed_bytes else "not needed"
    free = "free space unknown" if free_bytes is None else f"{gib(free_bytes)} free"
    what = f"{where}, {free}, {need}"
    values = {"needed_bytes": needed_bytes, "read_bytes_per_s": facts.offload_bytes_per_s}
    if free_bytes is not None and free_bytes < needed_bytes:
        remedy = "make room there, or choose a folder on a larger disk"
        return fatal("job.offload", what, "the disk is too full", remedy, EXIT_ENVIRONMENT)
    if facts.offload_bytes_per_s:
        what += f", read at {facts.offload_bytes_per_s / 1e9:.2g} GB/s"
    if facts.offload_system in _MEMORY:
        cause = "it is memory, and what stands there counts against the job's limit"
    elif facts.offload_system in _NETWORK:
        cause = "it is on a network, which all nodes and jobs share: each step reads all of it"
    elif 0 < facts.offload_bytes_per_s < _SLOW_BYTES_PER_S:
        cause = "a slow or busy disk: steps take as long as it does"
    else:
        return ok("job.offload", what, **values)
    return warning("job.offload", what, cause, _REMEDY, **values)
