"""`mpipipe slurm …`: what the launch scripts ask, answered on standard output.

Runs on a login node, on the first node of a job, and inside a container, without torch and MPI.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mpipipe.errors import ConfigError
from mpipipe.run_folder.workspace import job_workspace
from mpipipe.topology.mpi_library import ask_library, choose_mpi, offered_types
from mpipipe.topology.slurm import read_job

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["mpi_flag_command", "workspace_command"]


def mpi_flag_command(available: str) -> None:
    """Print the `--mpi=` value of srun for the installed MPI library.

    Args:
        available: what `srun --mpi=list` printed; empty: choose as if srun offered everything.

    Raises:
        EnvironmentSetupError: no MPI library, or srun offers nothing that fits it.
    """
    print(choose_mpi(ask_library(), offered_types(available)))


def workspace_command(config: Path, overrides: Sequence[str], scratch: Path) -> None:
    """Make the folder of this job below `scratch`, and print its file to source.

    Raises:
        MpipipeError: this is no Slurm job, the configuration or its model is wrong, or the folder
            cannot be filled.
    """
    job = read_job(os.environ)
    if job is None:
        raise ConfigError("this is no Slurm job (SLURM_JOB_ID is not set), so it has no folder")
    print(job_workspace(config, overrides, scratch, job))
