"""Memory that does not do, in all the words that libraries have for it."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest

from mpipipe.errors import (
    CheckpointError,
    EnvironmentSetupError,
    NumericsError,
    UnsupportedModelError,
    is_out_of_memory,
)
from mpipipe.runtime.memory_shortage import memory_shortage

ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 3538944 bytes. Error code 12 (Cannot allocate memory)"
)
GIB = 2**30


class OutOfMemoryError(RuntimeError):
    """As torch's: known by its name, as torch is not imported here."""


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError(ALLOCATOR),
        RuntimeError("unable to mmap 538090408 bytes from file <x>: Cannot allocate memory (12)"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        raised_from(CheckpointError("cannot be read"), OSError(errno.ENOMEM, "no memory")),
        raised_from(UnsupportedModelError("fails on a trial step"), RuntimeError(ALLOCATOR)),
    ],
)
def test_every_kind_of_shortage_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)
    told = memory_shortage(error, {"weights": 3 * GIB, "KV cache": GIB})
    assert isinstance(told, EnvironmentSetupError)
    assert told.exit_code == 5
    assert "3.00 GiB of weights and 1.00 GiB of KV cache" in str(told)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("the text says: out of memory"),  # what a template raises is not memory
        RuntimeError("shapes do not fit"),
        OSError(errno.ENOSPC, "No space left on device"),
        NumericsError("NaN"),
        KeyError("weights"),
        EnvironmentSetupError("the GPU has too little memory: out of memory"),  # is a sentence
    ],
)
def test_other_errors_are_left_alone(error: Exception) -> None:
    assert memory_shortage(error, {}) is None


def test_what_there_was_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    pages = GIB // resource.getpagesize()
    (tmp_path / "proc/self/statm").write_text(f"{pages} 5 5 5 0 5 0\n")
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {8 << 20} kB\nMemAvailable: {5 << 20} kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    group = tmp_path / "sys/fs/cgroup/job"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{4 * GIB}\n")
    (group / "memory.current").write_text(f"{2 * GIB}\n")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2 * GIB, resource.RLIM_INFINITY))
    told = str(memory_shortage(RuntimeError(ALLOCATOR), {}, root=tmp_path))
    assert "allows 2.00 GiB of addresses, 1.00 GiB are used" in told
    assert "the job's memory limit is 4.00 GiB" in told
    assert "2.00 GiB are available here" in told
    assert "tried to allocate 3538944 bytes" in told
    assert "needs" not in told  # nothing was planned yet
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert "ulimit -v` allows" not in str(memory_shortage(MemoryError(), {}, root=tmp_path))


def test_a_gpu_has_another_remedy() -> None:
    told = str(memory_shortage(OutOfMemoryError("CUDA out of memory. Tried"), {}))
    assert "gpu_memory_fraction" in told
    assert "ulimit" not in told
