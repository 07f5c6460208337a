"""`mpipipe slurm …`: what the launch scripts ask, answered in one word on standard output.

Runs on a login node, and inside a container, without starting MPI.
"""

from __future__ import annotations

from mpipipe.errors import EXIT_OK
from mpipipe.topology.srun_mpi import ask_library, choose_mpi, offered_types

__all__ = ["mpi_flag_command"]


def mpi_flag_command(available: str) -> int:
    """Print the `--mpi=` value of srun for the installed MPI library; returns the exit code.

    Args:
        available: what `srun --mpi=list` printed; empty: choose as if srun offered everything.

    Raises:
        EnvironmentSetupError: no MPI library, or srun offers nothing that fits it.
    """
    print(choose_mpi(ask_library(), offered_types(available)))
    return EXIT_OK
