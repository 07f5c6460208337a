"""What the NVIDIA driver tells through its management library (NVML): GPUs, who uses them, samples.

The only file that imports `pynvml` (the package `nvidia-ml-py`). Makes no CUDA context. Without the
package, the library or a driver there is nothing to ask, as on a host without a GPU; what one card,
driver or slice (MIG) does not tell is None. May be asked from any thread; a sample takes 4 ms.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mpipipe.topology.gpu import GpuFacts

__all__ = ["GpuDevice", "GpuProcess", "GpuSample", "Nvml", "opened_nvml", "query_host"]

# Bits of nvmlDeviceGetCurrentClocksEventReasons by the names that nvidia-smi gives them. Bit 0 says
# that the GPU is idle, which holds nothing back.
_THROTTLE_REASONS = (
    (0x002, "applications_clocks_setting"),
    (0x004, "sw_power_cap"),
    (0x008, "hw_slowdown"),
    (0x010, "sync_boost"),
    (0x020, "sw_thermal_slowdown"),
    (0x040, "hw_thermal_slowdown"),
    (0x080, "hw_power_brake_slowdown"),
    (0x100, "display_clock_setting"),
)
_SM_CLOCK, _MEMORY_CLOCK = 1, 2  # NVML_CLOCK_SM, NVML_CLOCK_MEM
_GPU_SENSOR = 0  # NVML_TEMPERATURE_GPU
# Capabilities with 64 cores a multiprocessor: P100, V100, Xavier, Turing, A100. Others since 2014
# have 128 (CUDA's programming guide, arithmetic instructions).
_HALVED_PROCESSORS = {(6, 0), (7, 0), (7, 2), (7, 5), (8, 0)}


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that computes on a GPU."""

    pid: int
    name: str
    gpu_uuid: str


@dataclass(frozen=True, slots=True)
class GpuSample:
    """A GPU at one moment; None: this card, driver or slice does not tell.

    Of a slice, clocks, temperature and throttling are those of its whole card; utilisation, power
    and energy cannot be told apart and are None.
    """

    utilisation: int | None  # % of the driver's last period (up to 1 s) in which a kernel ran
    memory_bytes: int | None  # in use, by all processes and the driver
    power_w: float | None
    energy_j: float | None  # since the driver was loaded; from Volta on
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    temperature_c: int | None
    throttle: tuple[str, ...] | None  # what holds the clocks down now; empty: nothing does


@dataclass(frozen=True, slots=True)
class GpuDevice:
    """One GPU or slice of an open library."""

    nvml: Nvml
    handle: Any
    card: Any  # the handle of the GPU that a slice is a part of; else `handle`

    def sample(self) -> GpuSample:
        """What the driver tells now."""
        ask, card = self.nvml.ask, self.card
        whole = self.handle is self.card
        utilisation = ask("nvmlDeviceGetUtilizationRates", card) if whole else None
        power_mw = ask("nvmlDeviceGetPowerUsage", card) if whole else None
        energy_mj = ask("nvmlDeviceGetTotalEnergyConsumption", card) if whole else None
        memory = ask("nvmlDeviceGetMemoryInfo", self.handle)
        # The second name of each is that of older drivers.
        reasons = ask("nvmlDeviceGetCurrentClocksEventReasons", card)
        if reasons is None:
            reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons", card)
        temperature_c = ask("nvmlDeviceGetTemperatureV", card, _GPU_SENSOR)
        if temperature_c is None:
            temperature_c = ask("nvmlDeviceGetTemperature", card, _GPU_SENSOR)
        return GpuSample(
            utilisation=None if utilisation is None else utilisation.gpu,
            memory_bytes=None if memory is None else memory.used,
            power_w=None if power_mw is None else power_mw / 1e3,
            energy_j=None if energy_mj is None else energy_mj / 1e3,
            sm_clock_mhz=ask("nvmlDeviceGetClockInfo", card, _SM_CLOCK),
            memory_clock_mhz=ask("nvmlDeviceGetClockInfo", card, _MEMORY_CLOCK),
            temperature_c=temperature_c,
            throttle=None if reasons is None else _names(reasons),
        )

    def link(self) -> tuple[int, int]:
        """Generation and lanes of PCI Express that card and slot can do together; 0: not told.

        Not what they do now: an idle card turns its link down.
        """
        generation = self.nvml.ask("nvmlDeviceGetMaxPcieLinkGeneration", self.card)
        width = self.nvml.ask("nvmlDeviceGetMaxPcieLinkWidth", self.card)
        return generation or 0, width or 0


def _names(reasons: int) -> tuple[str, ...]:
    return tuple(name for bit, name in _THROTTLE_REASONS if reasons & bit)


class Nvml:
    """The open library. Numbers are those of the host: no CUDA_VISIBLE_DEVICES, no slices."""

    def __init__(self, library: Any) -> None:
        self._library = library  # the module pynvml

    def ask(self, function: str, *arguments: Any) -> Any:
        """What a function of the library returns; None: not supported, not allowed, not there."""
        call = getattr(self._library, function, None)
        if call is None:
            return None
        try:
            return call(*arguments)
        except (self._library.NVMLError, UnicodeDecodeError):  # the latter: a process's name
            return None

    def driver_version(self) -> str:
        """E.g. "550.54.15"; empty when it is not told."""
        return self.ask("nvmlSystemGetDriverVersion") or ""

    def device(self, uuid: str) -> GpuDevice | None:
        """The GPU or slice with this UUID; None: it is not here.

        Args:
            uuid: that of `GpuFacts`: "MIG-…" of a slice, of a GPU without a prefix or "GPU-…".
        """
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        handle = self.ask("nvmlDeviceGetHandleByUUID", name)
        if handle is None:
            return None
        card = self.ask("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle)
        return GpuDevice(self, handle, handle if card is None else card)

    def gpus(self) -> tuple[GpuFacts, ...]:
        """The GPUs of this host; one that does not tell its memory or capability is left out.

        `nccl_version` is "unknown": torch brings NCCL along.
        """
        found = []
        for index, handle in self._handles():
            capability = self.ask("nvmlDeviceGetCudaComputeCapability", handle)
            memory = self.ask("nvmlDeviceGetMemoryInfo", handle)
            pci = self.ask("nvmlDeviceGetPciInfo", handle)
            if capability is None or memory is None:
                continue
            generation, width = GpuDevice(self, handle, handle).link()
            facts = GpuFacts(
                index=index,
                name=self.ask("nvmlDeviceGetName", handle) or "",
                uuid=self._uuid(handle),
                capability=10 * capability[0] + capability[1],
                memory_bytes=memory.total,
                free_bytes=memory.free,
                nccl_version="unknown",
                pci=f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0" if pci else "",
                link_generation=generation,
                link_width=width,
                num_processors=self._num_processors(handle, capability),
            )
            found.append(facts)
        return tuple(found)

    def processes(self) -> tuple[GpuProcess, ...]:
        """The processes that compute on the GPUs of this host, as far as they may be seen."""
        return tuple(
            GpuProcess(
                pid=process.pid,
                name=self.ask("nvmlSystemGetProcessName", process.pid) or "a process",
                gpu_uuid=self._uuid(handle),
            )
            for _, handle in self._handles()
            for process in self.ask("nvmlDeviceGetComputeRunningProcesses_v3", handle) or ()
        )

    def _num_processors(self, handle: Any, capability: tuple[int, int]) -> int:
        """Streaming multiprocessors, by their cores; 0: not told."""
        num_cores = self.ask("nvmlDeviceGetNumGpuCores", handle) or 0
        return int(num_cores // (64 if capability in _HALVED_PROCESSORS else 128))

    def _uuid(self, handle: Any) -> str:
        """As torch writes it, without "GPU-"; empty: not told."""
        return (self.ask("nvmlDeviceGetUUID", handle) or "").removeprefix("GPU-")

    def _handles(self) -> Iterator[tuple[int, Any]]:
        """The GPUs that answer, by their number; one that fell off the bus does not."""
        for index in range(self.ask("nvmlDeviceGetCount") or 0):
            handle = self.ask("nvmlDeviceGetHandleByIndex", index)
            if handle is not None:
                yield index, handle


@contextlib.contextmanager
def opened_nvml(library: Any = None) -> Iterator[Nvml | None]:
    """The library, open inside the block; None: no package, no library, or no driver.

    Args:
        library: in place of the module pynvml, for tests.
    """
    try:
        library = library or importlib.import_module("pynvml")  # 20 ms
        library.nvmlInit()
    except ImportError:
        yield None
        return
    except library.NVMLError:
        yield None
        return
    try:
        yield Nvml(library)
    finally:
        with contextlib.suppress(library.NVMLError):
            library.nvmlShutdown()


def query_host(library: Any = None) -> tuple[tuple[GpuFacts, ...], tuple[GpuProcess, ...]]:
    """`Nvml.gpus` and `Nvml.processes` of this host, at once; none without a driver."""
    with opened_nvml(library) as nvml:
        return (nvml.gpus(), nvml.processes()) if nvml is not None else ((), ())
