"""What the driver's management library tells, and what stays None."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest

from mpipipe.topology.nvml import GpuProcess, GpuSample, Nvml, opened_nvml, query_host
from tests.unit.fake_nvml import MIB, FakeCard, FakeNvml, memory


def answers(capability: tuple[int, int], total_mib: int, free_mib: int) -> dict[str, object]:
    return {
        "nvmlDeviceGetCudaComputeCapability": capability,
        "nvmlDeviceGetMemoryInfo": memory(total_mib, free_mib),
    }


BUSY = {
    "nvmlDeviceGetMemoryInfo": memory(1000, 250),
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=93, memory=40),
    "nvmlDeviceGetPowerUsage": 401_500,
    "nvmlDeviceGetTotalEnergyConsumption": 12_000_250,
    "nvmlDeviceGetClockInfo:1": 1980,
    "nvmlDeviceGetClockInfo:2": 2619,
    "nvmlDeviceGetTemperatureV:0": 54,
    "nvmlDeviceGetCurrentClocksEventReasons": 0x001 | 0x004 | 0x040,
}


def test_the_gpus_of_a_host_become_facts_and_one_without_numbers_is_left_out() -> None:
    pci = SimpleNamespace(domain=0, bus=0x3B, device=0)
    h200 = FakeCard(
        "GPU-aa", answers=answers((9, 0), 143771, 143000) | {"nvmlDeviceGetPciInfo": pci}
    )
    told = {
        "nvmlDeviceGetMaxPcieLinkGeneration": 3,
        "nvmlDeviceGetMaxPcieLinkWidth": 16,
        "nvmlDeviceGetNumGpuCores": 2560,
    }
    t4 = FakeCard("GPU-bb", "Tesla T4", answers=answers((7, 5), 15360, 15000) | told)
    k10 = FakeCard("GPU-cc", "Tesla K10", answers={"nvmlDeviceGetMemoryInfo": memory(1, 1)})
    mig = FakeCard("MIG-dd", part_of=h200, answers=answers((9, 0), 1, 1))
    library = FakeNvml(h200, t4, k10, mig)
    first, second = query_host(library)[0]
    assert (first.index, first.name, first.uuid, first.capability) == (
        0,
        "NVIDIA H200",
        "aa",
        90,
    )
    assert (first.memory_bytes, first.nccl_version) == (143771 * MIB, "unknown")
    assert (second.capability, second.free_bytes) == (75, 15000 * MIB)
    assert (second.link_generation, second.link_width) == (3, 16)
    assert (first.link_generation, first.link_width) == (0, 0), "not told"
    assert (first.num_processors, second.num_processors) == (0, 40)
    assert (first.pci, second.pci) == ("0000:3b:00.0", "")  # as in /sys/bus/pci/devices
    assert library.num_open == 0


@pytest.mark.parametrize(
    ("capability", "num_cores", "num_processors"),
    [((7, 0), 5120, 80), ((8, 0), 6912, 108), ((8, 9), 7424, 58), ((9, 0), 16896, 132)],
)
def test_multiprocessors_are_told_by_their_cores(
    capability: tuple[int, int], num_cores: int, num_processors: int
) -> None:
    told = answers(capability, 9, 9) | {"nvmlDeviceGetNumGpuCores": num_cores}
    ((gpu,), _) = query_host(FakeNvml(FakeCard("GPU-0", answers=told)))
    assert gpu.num_processors == num_processors


def test_a_gpu_that_is_lost_does_not_hide_the_others() -> None:
    cards = [FakeCard(f"GPU-{n}", answers=answers((8, 0), 9, 9)) for n in range(3)]
    gpus, _ = query_host(FakeNvml(*cards, lost=(1,)))
    assert [(gpu.index, gpu.uuid) for gpu in gpus] == [(0, "0"), (2, "2")]


def test_processes_are_told_with_their_gpu_and_what_the_driver_says_of_them() -> None:
    running = [SimpleNamespace(pid=12), SimpleNamespace(pid=5)]
    busy = FakeCard("GPU-1", answers={"nvmlDeviceGetComputeRunningProcesses_v3": running})
    _, processes = query_host(FakeNvml(FakeCard("GPU-0"), busy, names={12: "/opt/a, b/python"}))
    assert processes == (
        GpuProcess(12, "/opt/a, b/python", "1"),
        GpuProcess(5, "a process", "1"),
    )


def test_a_slice_has_the_link_of_its_card() -> None:
    told = {"nvmlDeviceGetMaxPcieLinkGeneration": 5, "nvmlDeviceGetMaxPcieLinkWidth": 8}
    card = FakeCard("GPU-1", answers=told)
    device = Nvml(FakeNvml(card, FakeCard("MIG-2", part_of=card))).device("MIG-2")
    assert device is not None
    assert device.link() == (5, 8)


def test_a_sample_holds_all_that_a_card_tells_in_the_units_of_its_names() -> None:
    device = Nvml(FakeNvml(FakeCard("GPU-1a", answers=BUSY))).device("1a")  # as torch writes it
    assert device is not None
    assert device.sample() == GpuSample(
        utilisation=93,
        memory_bytes=750 * MIB,
        power_w=401.5,
        energy_j=12_000.25,
        sm_clock_mhz=1980,
        memory_clock_mhz=2619,
        temperature_c=54,
        throttle=("sw_power_cap", "hw_thermal_slowdown"),  # an idle GPU is not throttled
    )


def test_what_a_card_does_not_tell_is_none() -> None:
    device = Nvml(FakeNvml(FakeCard("GPU-1"))).device("GPU-1")
    assert device is not None
    assert set(dataclasses.astuple(device.sample())) == {None}


def test_an_older_driver_is_asked_by_its_older_names() -> None:
    old = {
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0,
        "nvmlDeviceGetTemperature:0": 40,
    }
    device = Nvml(FakeNvml(FakeCard("GPU-1", answers=old))).device("GPU-1")
    assert device is not None
    sample = device.sample()
    assert (sample.throttle, sample.temperature_c) == ((), 40)


def test_a_slice_has_its_own_memory_and_the_clocks_of_its_card_but_not_its_power() -> None:
    card = FakeCard("GPU-1", answers=BUSY)
    mig = FakeCard("MIG-2", part_of=card, answers={"nvmlDeviceGetMemoryInfo": memory(100, 90)})
    device = Nvml(FakeNvml(card, mig)).device("MIG-2")
    assert device is not None
    sample = device.sample()
    assert (sample.memory_bytes, sample.sm_clock_mhz) == (10 * MIB, 1980)
    assert (sample.utilisation, sample.power_w, sample.energy_j) == (None, None, None)


def test_without_driver_library_or_package_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert query_host(FakeNvml(FakeCard("GPU-1"), driver=False)) == ((), ())
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with opened_nvml() as nvml:
        assert nvml is None


def test_an_unknown_uuid_is_no_device() -> None:
    assert Nvml(FakeNvml(FakeCard("GPU-1"))).device("GPU-2") is None


def test_the_library_is_closed_after_an_error_inside_the_block() -> None:
    library = FakeNvml(FakeCard("GPU-1"))

    def fail_inside() -> None:
        with opened_nvml(library):
            assert library.num_open == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert library.num_open == 0
