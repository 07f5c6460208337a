"""The environment of a run as it may be written down: what decides, and no secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["recorded_environment"]

_PREFIXES = (
    "CUDA_", "MPICH_", "MPIPIPE_", "MPIR_", "NCCL_", "OMPI_", "OMP_", "SLURM_", "UCX_",
)  # fmt: skip
# Whole lists of variables with their values, as `sbatch --export=ALL,HF_TOKEN=…` leaves them.
_LISTS = re.compile(r"EXPORT|ENV_LIST", re.IGNORECASE)
# By name: SLURM_JWT is a token; OMPI_MCA_orte_precondition_transports a key that ranks share.
_SECRET = re.compile(
    r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|JWT|COOKIE|AUTH|PRECONDITION_TRANSPORTS", re.IGNORECASE
)
# In a value: an assignment to a name like that, or a user and password in an address.
_SECRET_VALUE = re.compile(rf"\w*({_SECRET.pattern})\w*=|://[^/\s]*:[^/\s]*@", re.IGNORECASE)


def recorded_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of Slurm, MPI, UCX, NCCL, OpenMP, CUDA and mpipipe that hold no secret."""
    return {
        name: environ[name]
        for name in sorted(environ)
        if name.startswith(_PREFIXES)
        and not (_SECRET.search(name) or _LISTS.search(name))
        and not _SECRET_VALUE.search(environ[name])
    }
