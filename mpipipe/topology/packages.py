"""What is installed: versions of packages, and what optional attention backends compile with.

Looked for, not tried, and nothing is imported to find out: triton takes 0.3 s, flashinfer seconds.
Asked by `plan` on a login node, without torch, and by every rank; so both say the same.
`models.kernels.probe` tries whether a kernel then runs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

__all__ = [
    "flashinfer_is_usable",
    "has_c_compiler",
    "installed_attention_backends",
    "package_versions",
]


def package_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The version of each of `packages`, by the name it is installed under; None: it is not."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def has_c_compiler(environ: Mapping[str, str]) -> bool:
    """Whether Triton finds a C compiler for its launchers: `$CC`, where set, else gcc or clang."""
    names = (environ["CC"],) if environ.get("CC") else ("gcc", "clang")
    return any(shutil.which(name, path=environ.get("PATH")) for name in names)


def flashinfer_is_usable(environ: Mapping[str, str]) -> bool:
    """Whether FlashInfer is installed with its compiled kernels, or with nvcc to compile them."""
    if importlib.util.find_spec("flashinfer") is None:
        return False
    if importlib.util.find_spec("flashinfer_jit_cache") is not None:
        return True
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH") or "/usr/local/cuda"
    in_path = shutil.which("nvcc", path=environ.get("PATH"))
    return in_path is not None or (Path(home) / "bin/nvcc").exists()


def installed_attention_backends() -> tuple[str, ...]:
    """Optional attention backends whose packages, and whatever they compile with, are installed.

    Triton builds a small C launcher
    for every kernel, flashinfer compiles kernels unless its cache is installed.
    """
    found = []
    if importlib.util.find_spec("triton") is not None and has_c_compiler(os.environ):
        found.append("triton")
    if flashinfer_is_usable(os.environ):
        found.append("flashinfer")
    if _torch_release() >= (2, 13):  # the first whose varlen_attn reads paged keys and values
        found.append("varlen")
    return tuple(found)


def _torch_release() -> tuple[int, int]:
    version = package_versions(["torch"])["torch"]
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
