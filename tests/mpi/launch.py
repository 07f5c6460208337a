"""Run the MPI suite on N ranks under a hard limit: `python tests/mpi/launch.py N [pytest args]`.

Each rank has its own junit file and temporary folder. The run fails when a rank fails, hangs, or
tested nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

LIMIT_S = 600
SUITE = Path(__file__).parent


def launcher(num_ranks: int) -> list[str]:
    """The `mpiexec` beside this Python, or the site's; with what each MPI needs as root."""
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else "mpiexec"
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False)
    command = [mpiexec, "-n", str(num_ranks)]
    if "Open MPI" in version.stdout or "OpenRTE" in version.stdout:
        command += ["--oversubscribe", "--allow-run-as-root"]
    return command


def main() -> int:
    """Launch, then check that every rank ran the same, non-empty set of tests."""
    num_ranks = int(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="mpipipe-mpi-") as folder:
        environment = {**os.environ, "MPIPIPE_TEST_FOLDER": folder}
        command = [*launcher(num_ranks), sys.executable, "-m", "mpi4py", "-m", "pytest"]
        command += ["--with-mpi", "-p", "no:cacheprovider", str(SUITE), *sys.argv[2:]]
        try:
            code = subprocess.run(command, env=environment, timeout=LIMIT_S, check=False).returncode
        except subprocess.TimeoutExpired:
            print(f"the MPI suite hung for {LIMIT_S} s on {num_ranks} ranks", file=sys.stderr)
            return 1
        counts = [passed(Path(folder) / f"junit_rank_{rank}.xml") for rank in range(num_ranks)]
    if code == 0 and (min(counts) == 0 or len(set(counts)) != 1):
        print(f"ranks passed different numbers of tests, or none: {counts}", file=sys.stderr)
        return 1
    return code


def passed(junit: Path) -> int:
    """Tests of a junit file that ran and passed."""
    if not junit.exists():
        return 0
    return sum(
        not any(child.tag in {"failure", "error", "skipped"} for child in case)
        for case in ET.parse(junit).getroot().iter("testcase")
    )


if __name__ == "__main__":
    sys.exit(main())
