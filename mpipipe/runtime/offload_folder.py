"""The folder of `memory.offload_dir` on this rank's node: there, writable, with room. No torch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mpipipe.errors import EnvironmentSetupError
from mpipipe.planning.memory import gib
from mpipipe.planning.plan import StagePlan

__all__ = ["offload_need", "prepare_offload_folder"]


def offload_need(stages: Sequence[StagePlan], stage: StagePlan) -> tuple[int, str]:
    """Bytes that the ranks on the host of `stage` keep on disk together, and who they are.

    `stages`: of all replicas.

    The ranks of a host share the folder. 0 bytes: `stage` keeps none there.
    """
    if not _disk_bytes(stage):
        return 0, f"rank {stage.rank} on {stage.host}"
    sharing = [s for s in stages if s.host == stage.host and _disk_bytes(s)]
    ranks = [str(rank) for s in sharing for rank in s.ranks]
    numbers = ", ".join(ranks)
    who = f"rank {numbers}" if len(ranks) == 1 else f"ranks {numbers} together"
    return sum(_disk_bytes(s) * len(s.ranks) for s in sharing), f"{who} on {stage.host}"


def _disk_bytes(stage: StagePlan) -> int:
    return 0 if stage.offload is None else stage.offload.disk_bytes


def prepare_offload_folder(folder: Path, needed_bytes: int, *, who: str) -> None:
    """Make the folder, if need be, and see that files of `needed_bytes` fit there.

    All ranks do so before any of them writes: what a neighbour has written is free no more.

    Args:
        folder: absolute.
        needed_bytes: of all weights that this host's ranks keep there; 0: this rank keeps none.
        who: names ranks and host in the error.

    Raises:
        EnvironmentSetupError: it cannot be made or written, or has too little room.
    """
    if not needed_bytes:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
            file.flush()
        space = os.statvfs(folder)
    except OSError as error:
        raise EnvironmentSetupError(
            f"memory.offload_dir = {folder} cannot be used by {who} ({error.strerror or error}): "
            "give a folder on a local disk that every node has or can make, and that you may "
            "write to, e.g. $TMPDIR"
        ) from error
    free_bytes = space.f_bavail * space.f_frsize
    if space.f_blocks and free_bytes < needed_bytes:  # some file systems count no blocks
        raise EnvironmentSetupError(
            f"memory.offload_dir = {folder} has {gib(free_bytes)} free, but {gib(needed_bytes)} "
            f"of weights are to be kept there by {who}: make room, give a folder on a larger disk, "
            "or let more of them stay in memory (memory.device_bytes, memory.host_bytes)"
        )
