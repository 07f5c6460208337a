"""`mpipipe slurm workspace`: make the folder of a job, before its ranks start.

Runs on the first node of the job, or inside the image, without torch and MPI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpipipe.errors import EXIT_OK
from mpipipe.runtime.workspace import prepare_workspace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["workspace_command"]


def workspace_command(config: Path, overrides: Sequence[str], folder: Path) -> int:
    """Copy what the job reads into `folder` and print the file to source; returns the exit code.

    Raises:
        MpipipeError: the configuration or its model is wrong, or the folder cannot be filled.
    """
    print(prepare_workspace(config, overrides, folder))
    return EXIT_OK
