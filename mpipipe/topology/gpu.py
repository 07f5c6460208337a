"""Which GPU a rank uses, what is known of it without torch, and sentences for what is amiss.

`data_plane.device` asks torch, `planning.devices` decides for all ranks. Nothing here makes a CUDA
context. Readers take the root folder and the environment, for tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mpipipe.topology.launcher import detect

__all__ = [
    "GpuFacts",
    "container_kind",
    "cuda_init_problem",
    "driver_in_sight",
    "gpu_of_rank",
    "mig_slice",
    "no_driver_problem",
    "pci_address",
    "told_local_rank",
]

_ROOT = Path("/")
_DRIVER_FILES = ("dev/nvidiactl", "dev/dxg")  # the second under WSL

# Said by some launchers that `launcher.detect` takes for another. Not SLURM_LOCALID: the daemons of
# mpirun inherit it from the batch script.
_LOCAL_RANKS = ("PMIX_LOCAL_RANK", "PALS_LOCAL_RANKID", "PMI_LOCAL_RANK", "LOCAL_RANK")


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """The GPU that a rank would use; all empty without one. `problem`: why, with the remedy."""

    index: int = -1  # among the devices visible to this process
    name: str = ""
    uuid: str = ""
    capability: int = 0  # compute capability × 10: 75 is a T4, 90 an H100
    memory_bytes: int = 0
    free_bytes: int = 0
    nccl_version: str = ""  # "" without NCCL
    problem: str = ""
    pci: str = ""  # address, e.g. "0000:3b:00.0"; the same for two slices (MIG) of one GPU
    link_generation: int = 0  # of PCI Express, that card and slot can do together; 0: not told
    link_width: int = 0  # its lanes
    num_processors: int = 0  # streaming multiprocessors; 0: not told


# ---- which one -----------------------------------------------------------------------------------


def told_local_rank(environ: Mapping[str, str]) -> int | None:
    """This process's number among the ranks of its host, if a launcher says."""
    found = detect(environ).local_rank
    if found is not None:
        return found
    words = (environ.get(name, "") for name in _LOCAL_RANKS)
    return next((int(word) for word in words if word.isascii() and word.isdigit()), None)


def mig_slice(environ: Mapping[str, str], index: int) -> str:
    """The identity of the GPU slice (MIG) that a visible device is; empty: it is a whole GPU.

    CUDA names slices by UUID only, and shows a process the first of its list alone.
    """
    words = [word.strip() for word in environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    word = words[index] if index < len(words) else ""
    return word if word.startswith("MIG-") else ""


def gpu_of_rank(local_rank: int, num_visible: int) -> int:
    """The index of the GPU for a rank: one each, in order, starting over when there are too few.

    A rank that sees only its own (srun --gpus-per-task=1) takes number 0. Whether ranks may share
    is not for one rank to know (`planning.devices`).
    """
    return local_rank % num_visible


def pci_address(uuid: str, root: Path = _ROOT) -> str:
    """The PCI address of the GPU with this UUID, as the driver lists it; empty: not listed."""
    for file in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        with contextlib.suppress(OSError):
            if uuid and uuid.lower() in file.read_text(errors="replace").lower():
                return file.parent.name
    return ""


# ---- what is there -------------------------------------------------------------------------------


def driver_in_sight(root: Path = _ROOT) -> bool:
    """Whether an NVIDIA driver can be reached, at no cost: its device file, or its library."""
    if any((root / name).exists() for name in _DRIVER_FILES):
        return True
    if root != _ROOT:
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


# ---- what is amiss -------------------------------------------------------------------------------


def container_kind(environ: Mapping[str, str], root: Path = _ROOT) -> str:
    """`apptainer`, `docker`, or empty: not in a container."""
    names = {"APPTAINER_CONTAINER", "APPTAINER_NAME", "SINGULARITY_CONTAINER", "SINGULARITY_NAME"}
    if names & environ.keys() or (root / ".singularity.d").exists():
        return "apptainer"
    if (root / ".dockerenv").exists() or (root / "run/.containerenv").exists():
        return "docker"
    return ""


def no_driver_problem(environ: Mapping[str, str], root: Path = _ROOT) -> str:
    """The sentence for a missing driver; in a container it is most likely only hidden."""
    match container_kind(environ, root):
        case "apptainer":
            remedy = "start it with --nv (apptainer exec --nv …)"
        case "docker":
            remedy = "start it with --gpus all (docker run --gpus all …)"
        case _:
            return (
                "no NVIDIA driver is visible on this host: run it on a host with a GPU (under "
                "Slurm ask for one, e.g. --gres=gpu:1), install the driver, or set "
                'pipeline.device = "cpu"'
            )
    return f"no NVIDIA driver visible in this container: {remedy}, on a host that has a GPU"


def cuda_init_problem(
    message: str, torch_cuda: str, environ: Mapping[str, str], root: Path = _ROOT
) -> str:
    """What torch said when CUDA did not start, as one sentence with the remedy.

    Args:
        message: of the exception.
        torch_cuda: the CUDA version that torch was built for, e.g. "13.0".
        environ: tells about containers and hidden devices.
        root: as in the other readers.
    """
    first_line = message.strip().partition("\n")[0].rstrip(". ")
    if "no NVIDIA driver" in message:
        return no_driver_problem(environ, root)
    if "too old" in message:
        found = re.search(r"found version (\d+)", message)
        offered = ""
        if found:
            number = int(found[1])  # 12040 is CUDA 12.4
            offered = f", while the driver offers CUDA {number // 1000}.{number % 1000 // 10}"
        return (
            f"the NVIDIA driver is too old for this torch, which was built for CUDA {torch_cuda}"
            f"{offered}: update the driver, or install a torch built for an older CUDA"
        )
    hidden = environ.get("CUDA_VISIBLE_DEVICES")
    if "No CUDA GPUs" in message and hidden is not None:
        return (
            f'CUDA_VISIBLE_DEVICES = "{hidden}" leaves this rank no GPU: unset it, or ask the '
            "launcher for GPUs (srun --gres=gpu:1)"
        )
    if "No CUDA GPUs" in message:
        return (
            "the NVIDIA driver is there but shows no GPU: ask the launcher for one (srun "
            "--gres=gpu:1), and see what nvidia-smi lists"
        )
    return f"CUDA could not be started ({first_line}): see whether nvidia-smi works on this host"
