"""`mpipipe slurm workspace`: make the folder of a job, before its ranks start.

Runs on the first node of the job, or inside the image, without torch and MPI.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mpipipe.errors import EXIT_OK, ConfigError
from mpipipe.run_folder.workspace import job_workspace
from mpipipe.topology.slurm import read_job

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["workspace_command"]


def workspace_command(config: Path, overrides: Sequence[str], scratch: Path) -> int:
    """Make the folder of this job below `scratch`, print its file to source; returns the exit code.

    Raises:
        MpipipeError: this is no Slurm job, the configuration or its model is wrong, or the folder
            cannot be filled.
    """
    job = read_job(os.environ)
    if job is None:
        raise ConfigError("this is no Slurm job (SLURM_JOB_ID is not set), so it has no folder")
    print(job_workspace(config, overrides, scratch, job))
    return EXIT_OK
