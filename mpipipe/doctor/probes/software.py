"""Reads which Python packages and CUDA libraries this rank would run with.

The traps of containers: a torch or CUDA wheel in the user's site folder that wins over the image's,
and folders on LD_LIBRARY_PATH that put other CUDA libraries before torch's own. Importing torch
happens here (`import_torch`), late, and its failure is a fact, not an error.
"""

from __future__ import annotations

import importlib.metadata
import re
import site
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpipipe._version import __version__
from mpipipe.doctor.facts import Library, SoftwareFacts, Wheel
from mpipipe.doctor.probes.launch import loaded_libraries
from mpipipe.topology.packages import package_versions

__all__ = ["TorchImport", "cuda_libraries_in", "import_torch", "nvidia_wheels", "probe_software"]

_PACKAGES = ("torch", "transformers", "mpi4py", "triton", "flashinfer-python", "safetensors")
_CUDA_LIBRARY = re.compile(r"lib(cuda|cudart|nccl|cublas|cublasLt|cudnn|nvrtc)\.so(\.\d+)*")
_PIN = re.compile(r"(nvidia-[\w-]+)\s*\(?==\s*([\w.]+)")


@dataclass(frozen=True, slots=True)
class TorchImport:
    """How `import torch` went."""

    path: str = ""
    cuda: str = ""
    problem: str = ""
    seconds: float = 0.0


def import_torch() -> TorchImport:
    """Import torch, which takes seconds, or say why it cannot be."""
    start_s = time.perf_counter()
    try:
        import torch
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # OSError: ctypes could not load a library; AttributeError: half an installation.
        line = str(error).strip().partition("\n")[0] or type(error).__name__
        return TorchImport(problem=line, seconds=time.perf_counter() - start_s)
    path = str(Path(torch.__file__).parent)
    seconds = time.perf_counter() - start_s
    return TorchImport(path=path, cuda=torch.version.cuda or "", seconds=seconds)


def probe_software(environ: Mapping[str, str], torch_import: TorchImport) -> SoftwareFacts:
    """The packages of this Python, after torch was imported or failed to be."""
    copies = _copies("torch", sys.path)
    folders = [folder for folder in environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    wheels = nvidia_wheels(importlib.metadata.distributions())
    return SoftwareFacts(
        versions={
            "python": sys.version.split()[0],
            "mpipipe": __version__,
            **{name: version or "" for name, version in package_versions(_PACKAGES).items()},
        },
        user_site=site.getusersitepackages() if site.ENABLE_USER_SITE else "",
        torch_path=torch_import.path or (copies[0] if copies else ""),
        torch_copies=copies,
        torch_cuda=torch_import.cuda,
        torch_problem=torch_import.problem,
        torch_import_s=round(torch_import.seconds, 2),
        nvidia_wheels=wheels,
        bundled=_bundled(copies[:1], wheels),
        loaded=loaded_libraries(),
        search_path=tuple(folders),
        on_search_path=cuda_libraries_in(folders),
        hub_offline=environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"},
    )


def _copies(package: str, search: Sequence[str]) -> tuple[str, ...]:
    """Every folder on `search` that holds the package, in the order in which Python looks."""
    found = [Path(entry or ".") / package for entry in search]
    return tuple(dict.fromkeys(str(path) for path in found if (path / "__init__.py").exists()))


def nvidia_wheels(found: Iterable[importlib.metadata.Distribution]) -> tuple[Wheel, ...]:
    """The `nvidia-…` packages, as often as they are installed, with the version torch pins."""
    wheels: dict[tuple[str, str], tuple[str, str]] = {}
    pins: dict[str, str] = {}
    for distribution in found:
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name == "torch" and not pins:  # the first on the path is the one that counts
            pins = {
                match[1]: match[2]
                for line in distribution.requires or ()
                if (match := _PIN.match(line))
            }
        if name.startswith("nvidia-"):
            folder = str(distribution.locate_file(""))
            wheels.setdefault((name, folder), (distribution.version, folder))
    return tuple(
        Wheel(name, version, folder, pins.get(name, ""))
        for (name, _), (version, folder) in sorted(wheels.items())
    )


def _bundled(torch_folders: Sequence[str], wheels: Sequence[Wheel]) -> tuple[str, ...]:
    """Names of the CUDA libraries that torch brings along, in its own folder or in wheels."""
    folders = [Path(folder) / "lib" for folder in torch_folders]
    for root in {wheel.folder for wheel in wheels}:
        folders.extend(Path(root).glob("nvidia/*/lib"))
    names = {library.name for library in cuda_libraries_in(list(map(str, folders)))}
    return tuple(sorted(names))


def cuda_libraries_in(folders: Sequence[str]) -> tuple[Library, ...]:
    """The CUDA libraries in these folders, one path for each name and folder."""
    found: dict[tuple[str, str], Library] = {}
    for folder in folders:
        try:
            paths = sorted(Path(folder).iterdir())
        except OSError:
            continue
        for path in paths:
            if match := _CUDA_LIBRARY.fullmatch(path.name):
                name = f"lib{match[1]}"
                found.setdefault((name, folder), Library(name, str(path)))
    return tuple(found.values())
