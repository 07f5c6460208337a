"""What a stage has used of its device, and of Python to keep it busy."""

from __future__ import annotations

from dataclasses import dataclass

from mpipipe.metrics.offload import OffloadUse, PageMoveUse

__all__ = ["DeviceUse"]


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """Nothing where nothing is measured."""

    gpu_peak_bytes: int = 0  # reserved at once, since the stage was opened
    cpu_us_per_step: float | None = None  # median, to put a decode step on the device's queue
    offload: OffloadUse | None = None  # None: all weights stand on the device
    page_moves: PageMoveUse | None = None  # None: no KV pages in host memory
