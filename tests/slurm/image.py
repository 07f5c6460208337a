"""An image from launch/apptainer.def, cheap enough for every test run.

The recipe is executed as a user executes it, with a local base and a folder of wheels; but torch
and the other heavy packages are stand-ins that point to this Python's own, which the job binds
read-only. So what is tested is the recipe, the way into the container under srun, and the
container's MPI; not that the heavy packages themselves can be installed there. mpipipe and the MPI
in the image are real. The base is Debian's Python, unpacked and not configured.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

from tests.slurm.apptainer import install_apptainer, run
from tests.slurm.packages import ClusterUnavailableError

__all__ = ["borrowed_packages", "build_image"]

ROOT = Path(__file__).parents[2]
_BASE = (
    "python3-venv", "libstdc++6", "bash", "dash", "coreutils", "sed", "grep", "findutils",
)  # fmt: skip


def borrowed_packages() -> Path:
    """The site-packages folder that the image borrows from."""
    return Path(sys.prefix) / "lib" / f"python{_minor()}" / "site-packages"


def build_image(folder: Path) -> Path:
    """Build the image as a folder, which saves packing it; takes half a minute.

    Raises:
        ClusterUnavailableError: apt or Apptainer failed.
    """
    apptainer = install_apptainer()
    _allow_fakeroot()
    base, wheels, image = folder / "base", folder / "wheels", folder / "mpipipe.sandbox"
    _unpack_base(base)
    _gather_wheels(wheels)
    arguments = {"bootstrap": "localimage", "base": base, "mpi": "mpich", "wheels": wheels}
    run(
        apptainer, "build", "--sandbox", "--fakeroot", "--notest",
        *(word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")),
        image, "launch/apptainer.def",
        cwd=ROOT, APPTAINER_DROP_CAPS="CAP_SYS_RESOURCE", APPTAINER_TMPDIR=str(folder),
    )  # fmt: skip
    return image


def _minor() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _allow_fakeroot() -> None:
    for name in ("/etc/subuid", "/etc/subgid"):
        path = Path(name)
        text = path.read_text() if path.exists() else ""
        if not re.search(r"^root:", text, re.MULTILINE):
            path.write_text(f"{text}root:1000000:65536\n")


def _unpack_base(base: Path) -> None:
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    run(
        "mmdebstrap", "--quiet", "--variant=extract", f"--include={','.join(_BASE)}",
        '--aptopt=APT::Sandbox::User "root"', "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        release, base,
    )  # fmt: skip
    shutil.rmtree(base / "dev")  # device files, which a build as fakeroot cannot make
    (base / "dev").mkdir()
    (base / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (base / "etc/group").write_text("root:x:0:\n")
    # The recipe would install a compiler for Triton, which a CPU has no use for.
    (base / "usr/bin/gcc").symlink_to("/bin/false")
    if not (base / f"usr/bin/python{_minor()}").exists():
        raise ClusterUnavailableError(
            f"the tests run on Python {_minor()}, and {release} has another: the image could not "
            "borrow its packages; run tox with the system's Python"
        )


def _gather_wheels(wheels: Path) -> None:
    """Real wheels of what is small and must be real, stand-ins for the rest."""
    wheels.mkdir()
    words = ("download", "-q", "--no-deps", "-d", wheels, "setuptools", f"mpich=={_mpich()}")
    run(sys.executable, "-m", "pip", *words)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["demo"]]
    for number, requirement in enumerate(wanted):
        name = re.match(r"[\w.-]+", requirement)
        assert name is not None, requirement
        _fallback_graph(wheels, name[0], first=number == 0)


def _mpich() -> str:
    pins = (ROOT / "launch/constraints.txt").read_text()
    pin = re.search(r"^mpich==(\S+)", pins, re.MULTILINE)
    assert pin is not None, "launch/constraints.txt pins the versions"
    return pin[1]


def _fallback_graph(wheels: Path, name: str, *, first: bool) -> None:
    """A wheel of no code; the first one makes Python look into the borrowed folder, too."""
    normal, number = name.replace("-", "_"), version(name)
    folder = f"{normal}-{number}.dist-info"
    files = {
        f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n",
        f"{folder}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if first:
        files["borrowed.pth"] = f"{borrowed_packages()}{os.linesep}"
    record = "".join(f"{path},,\n" for path in (*files, f"{folder}/RECORD"))
    with zipfile.ZipFile(wheels / f"{normal}-{number}-py3-none-any.whl", "w") as archive:
        for path, text in (files | {f"{folder}/RECORD": record}).items():
            archive.writestr(path, text)
