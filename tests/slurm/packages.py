"""Debian packages of the test cluster: installed when they are missing.

Not here: configuring or starting anything; the packages' own services are never started (there
is no systemd in the containers that CI uses, and the cluster has its own folders and ports).
Invariant: a machine that cannot have them fails the suite with a sentence; it never skips.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["ClusterUnavailableError", "install_missing", "install_programs"]

SLURM = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
}
PLUGINS = {
    "slurm-wlm/auth_munge.so": "slurm-wlm-basic-plugins",
    "slurm-wlm/accounting_storage_mysql.so": "slurm-wlm-mysql-plugin",
    "pmix2/lib/libpmix.so.2": "libpmix2",
}
LIBRARIES = Path("/usr/lib") / f"{os.uname().machine}-linux-gnu"
APT_LIMIT_S = 300
INSTEAD = (
    "install Slurm 22.05 or newer yourself, or leave the suite out with MPIPIPE_SLURM_TESTS=off"
)


class ClusterUnavailableError(Exception):
    """The machine cannot run the cluster; the sentence says why and what to do."""


def install_missing(programs: Mapping[str, str] = SLURM, *, plugins: bool = True) -> None:
    """Install what is not there; `programs` maps a command to its package.

    Raises:
        ClusterUnavailableError: not root, no apt, or apt failed.
    """
    if os.geteuid() != 0:
        raise ClusterUnavailableError(
            "tests/slurm needs root (network namespaces, Slurm's daemons): run it in a container "
            "as root, or leave it out with MPIPIPE_SLURM_TESTS=off"
        )
    missing = [package for program, package in programs.items() if not _found(program)]
    if plugins:
        missing += [package for file, package in PLUGINS.items() if not (LIBRARIES / file).exists()]
    if missing:
        _install(missing, INSTEAD)
    if plugins:
        _complete_pmix()


def install_programs(programs: Mapping[str, str], instead: str) -> None:
    """Install the programs that are not there; `programs` maps a command to its package.

    Raises:
        ClusterUnavailableError: not root, no apt, or apt failed; `instead` says what else to do.
    """
    missing = [package for program, package in programs.items() if not _found(program)]
    if missing and os.geteuid() != 0:
        raise ClusterUnavailableError(
            f"{', '.join(missing)} not found, and only root can install that: do so, or {instead}"
        )
    if missing:
        _install(missing, instead)


def _found(program: str) -> bool:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is not None


def _install(packages: Sequence[str], instead: str) -> None:
    if not _found("apt-get"):
        raise ClusterUnavailableError(
            f"{', '.join(packages)} not found, and there is no apt-get to install them: {instead}"
        )
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (
        ["update", "-qq"],
        ["install", "-y", "-qq", "--no-install-recommends", *packages],
    ):
        result = subprocess.run(
            ["apt-get", *words],
            env=environ,
            capture_output=True,
            text=True,
            timeout=APT_LIMIT_S,
            check=False,
        )
        if result.returncode:
            raise ClusterUnavailableError(
                f"apt-get {' '.join(words)} failed: {result.stderr.strip()[-500:]}"
            )


def _complete_pmix() -> None:
    """Add the one link that Debian's mpi/pmix plugin opens, and only libpmix-dev brings."""
    link = LIBRARIES / "pmix2/lib/libpmix.so"
    if not link.exists():
        link.symlink_to("libpmix.so.2")
