"""Rules of the suite that runs under mpiexec: no silent skip, no rank waits for a failed one."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIMIT_S = 60
LET_OTHERS_REPORT_S = 0.5

# The suites of the contracts are beside their other implementations.
sys.path.insert(0, str(HERE.parent / "contract"))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give each rank its own junit file and temporary folder, in the one of launch.py."""
    folder = os.environ.get("MPIPIPE_TEST_FOLDER")
    if folder is None or not config.getoption("--with-mpi"):
        return
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.Get_rank()
    config.option.xmlpath = str(Path(folder) / f"junit_rank_{rank}.xml")
    config.option.basetemp = str(Path(folder) / f"tmp_rank_{rank}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark everything here as needing ranks, with a hard limit; refuse to run it without."""
    mine = [item for item in items if HERE in item.path.parents]
    if mine and not config.getoption("--with-mpi"):
        raise pytest.UsageError(
            "tests/mpi needs ranks and would be skipped silently: run it with "
            "`python tests/mpi/launch.py 2`, or leave the folder out"
        )
    for item in mine:
        item.add_marker(pytest.mark.mpi)
        item.add_marker(pytest.mark.timeout(LIMIT_S, method="thread"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A rank that failed says why and ends the others, which would wait for it for ever."""
    if not report.failed:
        return
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    where = (
        f"rank {world.Get_rank()} of {world.Get_size()}: {report.nodeid} failed in {report.when}"
    )
    sys.stderr.write(f"\n{where}\n{report.longreprtext}\n")
    sys.stderr.flush()
    if world.Get_size() > 1:
        time.sleep(LET_OTHERS_REPORT_S)
        world.Abort(1)
