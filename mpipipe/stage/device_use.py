"""What a stage has used of its device, and of Python to keep it busy."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DeviceUse"]


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """Nothing where nothing is measured (CPUs)."""

    gpu_peak_bytes: int = 0  # reserved at once, since the stage was opened
    cpu_us_per_step: float | None = None  # median, to put a decode step on the device's queue
