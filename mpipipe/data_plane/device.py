"""What torch says of the GPU that this rank would use. Importing this loads torch.

`planning.devices` chooses the device for all ranks; `topology.gpu` words the problems. Reading
costs a CUDA context on the rank's own GPU, 0.2–0.5 s.
"""

from __future__ import annotations

import os
import re

import torch
import torch.distributed

from mpipipe.topology.gpu import (
    GpuFacts,
    cuda_init_problem,
    gpu_of_rank,
    mig_slice,
    pci_address,
)
from mpipipe.topology.nvml import opened_nvml

__all__ = ["nccl_version", "read_gpu"]


def read_gpu(local_rank: int) -> GpuFacts:
    """The facts of this rank's GPU, which becomes the process's current device.

    Never raises for a GPU that cannot be used: `GpuFacts.problem` says why.
    """
    built_for = torch.version.cuda
    if built_for is None:
        return GpuFacts(
            problem=f"torch {torch.__version__} was built without CUDA: install a torch with CUDA "
            "(the default wheel of PyPI has it)"
        )
    try:
        torch.cuda.init()
        index = gpu_of_rank(local_rank, torch.cuda.device_count())
        torch.cuda.set_device(index)
        free_bytes, memory_bytes = torch.cuda.mem_get_info(index)
        properties = torch.cuda.get_device_properties(index)
    except (RuntimeError, AssertionError) as error:
        return GpuFacts(problem=cuda_init_problem(str(error), built_for, os.environ))
    capability = 10 * properties.major + properties.minor
    oldest = _oldest_capability(torch.cuda.get_arch_list())
    if capability < oldest:
        return GpuFacts(
            problem=f"torch {torch.__version__} has no kernels for the {properties.name} of "
            f"compute capability {capability // 10}.{capability % 10}, only from {oldest // 10}."
            f"{oldest % 10} on: install a torch built for an older CUDA than {built_for}"
        )
    uuid = mig_slice(os.environ, index) or str(properties.uuid)
    link_generation, link_width = _link(uuid)
    return GpuFacts(
        index=index,
        name=properties.name,
        uuid=uuid,
        capability=capability,
        memory_bytes=memory_bytes,
        free_bytes=free_bytes,
        nccl_version=nccl_version(),
        pci=_pci_address(properties),
        link_generation=link_generation,
        link_width=link_width,
        num_processors=properties.multi_processor_count,
    )


def _link(uuid: str) -> tuple[int, int]:
    """As `GpuDevice.link`; torch does not know it."""
    with opened_nvml() as nvml:
        device = None if nvml is None else nvml.device(uuid)
        return (0, 0) if device is None else device.link()


def _pci_address(properties: object) -> str:
    """As Linux writes it. Not every torch tells; then the driver does, if its files are visible."""
    names = ("pci_domain_id", "pci_bus_id", "pci_device_id")
    numbers = [getattr(properties, name, None) for name in names]
    if any(number is None for number in numbers):
        return pci_address(str(getattr(properties, "uuid", "")))
    domain, bus, device = (int(number) for number in numbers if number is not None)
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


def nccl_version() -> str:
    """E.g. "2.28.9"; empty when this torch has no NCCL."""
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return ""
    return ".".join(str(part) for part in torch.cuda.nccl.version())


def _oldest_capability(architectures: list[str]) -> int:
    """The lowest compute capability × 10 that torch has kernels for; 0 when it does not say."""
    numbers = [re.fullmatch(r"(?:sm|compute)_(\d+)[af]?", name) for name in architectures]
    return min((int(number[1]) for number in numbers if number), default=0)
