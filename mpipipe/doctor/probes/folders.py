"""Looks at the folders of a job from every host: there, whole, writable, shared, how fast.

One rank per host does it, all hosts at once: that is also how a job meets its file system. Leaves
nothing behind. `checks.job` says what the figures mean.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mpipipe.checkpoint.index import read_index
from mpipipe.config.load import LoadedConfig
from mpipipe.config.schema import AUTO
from mpipipe.errors import CheckpointError, MpipipeError
from mpipipe.planning.model_facts import ModelFacts, read_model
from mpipipe.planning.resources import absolute_offload_dir
from mpipipe.topology.disk import disk_bytes_per_s
from mpipipe.topology.host import read_text

__all__ = [
    "FolderFacts",
    "claim_marker",
    "file_system",
    "free_space_bytes",
    "output_folder",
    "probe_folders",
    "read_bytes_per_s",
    "write_bytes_per_s",
]

_READ_LIMIT_BYTES = 256 * 2**20
_WRITE_LIMIT_BYTES = 32 * 2**20
_LIMIT_S = 1.0
_BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class FolderFacts:
    """What one host sees. Speeds 0: not measured. `…_problem`: why it cannot be used."""

    host: str
    model_problem: str = ""
    model_exit_code: int = 0
    model_bytes: int = 0
    model_system: str = ""  # file system type, e.g. "nfs4"
    read_bytes_per_s: float = 0.0
    output: str = ""  # the folder, absolute
    output_problem: str = ""
    output_system: str = ""
    output_shared: bool = True  # what the head has made there is to be seen
    output_free_bytes: int | None = 0  # None: the file system does not say
    write_bytes_per_s: float = 0.0
    offload: str = ""  # the folder for offloaded weights, absolute; empty: none is configured
    offload_problem: str = ""
    offload_system: str = ""
    offload_free_bytes: int | None = 0
    offload_bytes_per_s: float = 0.0  # that its disk reads


def output_folder(loaded: LoadedConfig) -> Path:
    """The run folder, or the one that holds it while its name is not known."""
    setting = loaded.config.output.dir
    return Path("runs" if setting == AUTO else setting).absolute()


@contextlib.contextmanager
def claim_marker(output: Path) -> Iterator[str]:
    """An empty folder in `output`, or above it, for as long as this lasts; "" if it fails."""
    marker = _existing(output) / f".mpipipe-doctor-{secrets.token_hex(4)}"
    try:
        marker.mkdir()
    except OSError:
        yield ""
        return
    try:
        yield str(marker)
    finally:
        with contextlib.suppress(OSError):
            for path in marker.iterdir():
                path.unlink()
            marker.rmdir()


def probe_folders(
    loaded: LoadedConfig, marker: str, host: str, *, quick: bool
) -> tuple[FolderFacts, ModelFacts | None]:
    """What this host sees of both folders, and the model where it could be read.

    Args:
        loaded: names the folders.
        marker: what `claim_marker` made on the head; "" when it could not.
        host: this one.
        quick: measure no speed.
    """
    output = _output_facts(host, output_folder(loaded), marker, quick=quick)
    output = _with_offload(output, loaded.config.memory.offload_dir, quick=quick)
    try:
        model = read_model(loaded)
    except MpipipeError as error:
        exit_code = int(error.exit_code)
        return replace(output, model_problem=str(error), model_exit_code=exit_code), None
    num_bytes, speed = 0, 0.0
    if loaded.config.model.weights != "random":
        with contextlib.suppress(OSError, CheckpointError):  # it was whole a moment ago
            index = read_index(model.folder)
            largest = max(index.files, key=lambda path: path.stat().st_size)
            speed = 0.0 if quick else read_bytes_per_s(largest)
            num_bytes = index.file_bytes
    facts = replace(
        output,
        model_system=file_system(model.folder),
        model_bytes=num_bytes,
        read_bytes_per_s=round(speed),
    )
    return facts, model


def _output_facts(host: str, output: Path, marker: str, *, quick: bool) -> FolderFacts:
    there = _existing(output)
    problem, speed, free_bytes = "", 0.0, None
    try:
        free_bytes = free_space_bytes(os.statvfs(there))
        folder = Path(marker) if marker and Path(marker).is_dir() else there
        path = folder / f".mpipipe-doctor-{secrets.token_hex(4)}"
        speed = write_bytes_per_s(path, 4096 if quick else _WRITE_LIMIT_BYTES)
    except OSError as error:
        problem = error.strerror or str(error)
    return FolderFacts(
        host,
        output=str(output),
        output_problem=problem,
        output_system=file_system(there),
        output_shared=not marker or Path(marker).is_dir(),
        output_free_bytes=free_bytes,
        write_bytes_per_s=0.0 if quick else round(speed),
    )


def _with_offload(facts: FolderFacts, offload_dir: str, *, quick: bool) -> FolderFacts:
    """`facts` with what can be seen of `memory.offload_dir`, which a run makes where it is not."""
    if not offload_dir:
        return facts
    folder = absolute_offload_dir(offload_dir)
    there = _existing(Path(folder))
    problem, speed, free_bytes = "", 0.0, None
    try:
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\0")
        free_bytes = free_space_bytes(os.statvfs(there))
        speed = 0.0 if quick else disk_bytes_per_s(str(there))
    except OSError as error:
        problem = error.strerror or str(error)
    return replace(
        facts,
        offload=folder,
        offload_problem=problem,
        offload_system=file_system(there),
        offload_free_bytes=free_bytes,
        offload_bytes_per_s=speed,
    )


def free_space_bytes(space: os.statvfs_result) -> int | None:
    """What we may still write; None: a file system that counts no blocks (some FUSE, some NFS)."""
    return space.f_bavail * space.f_frsize if space.f_blocks > 0 else None


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest one above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def file_system(folder: Path, root: Path = Path("/")) -> str:
    """The type of the file system that holds `folder`, e.g. "lustre"; empty when not known."""
    found = (Path("/"), "")
    for line in read_text(root / "proc/self/mounts").splitlines():
        _, point, system, *_ = [*line.split(), "", "", ""]
        mount = Path(point.replace("\\040", " "))
        # The last of equally deep mounts hides the others.
        if folder.is_relative_to(mount) and len(mount.parts) >= len(found[0].parts):
            found = mount, system
    return found[1]


def read_bytes_per_s(path: Path) -> float:
    """How fast the middle of a file is read, after this host has forgotten it; for at most 1 s.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    num_bytes = min(size, _READ_LIMIT_BYTES)
    with path.open("rb", buffering=0) as file:
        start = (size - num_bytes) // 2
        os.posix_fadvise(file.fileno(), start, num_bytes, os.POSIX_FADV_DONTNEED)
        file.seek(start)
        block = bytearray(_BLOCK_BYTES)
        done, started_s = 0, time.perf_counter()
        while done < num_bytes and time.perf_counter() - started_s < _LIMIT_S:
            count = file.readinto(block)
            if not count:
                break
            done += count
    return done / max(time.perf_counter() - started_s, 1e-9)


def write_bytes_per_s(path: Path, num_bytes: int) -> float:
    """How fast a new file is written and synced, for about 1 s; it is removed again.

    Raises:
        OSError: it cannot be written, or the disk is full.
    """
    block = bytes(min(num_bytes, _BLOCK_BYTES))
    done, started_s = 0, time.perf_counter()
    try:
        with path.open("xb", buffering=0) as file:
            while done < num_bytes and time.perf_counter() - started_s < _LIMIT_S:
                done += file.write(block)
                os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    return done / max(time.perf_counter() - started_s, 1e-9)
