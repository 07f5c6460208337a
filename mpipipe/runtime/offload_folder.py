"""The folder of `memory.offload_dir` on this rank's node: there, writable, with room. No torch."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mpipipe.errors import EnvironmentSetupError
from mpipipe.planning.memory import gib

__all__ = ["prepare_offload_folder"]


def prepare_offload_folder(folder: Path, needed_bytes: int, *, who: str) -> None:
    """Make the folder, if need be, and see that a file of `needed_bytes` fits there.

    Args:
        folder: absolute.
        needed_bytes: of this rank's weights on disk; 0: it keeps none there.
        who: names rank and host in the error.

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
            f"memory.offload_dir = {folder} has {gib(free_bytes)} free, but {who} is to keep "
            f"{gib(needed_bytes)} of weights there: make room, give a folder on a larger disk, or "
            "let more of them stay in memory (memory.device_bytes, memory.host_bytes)"
        )
