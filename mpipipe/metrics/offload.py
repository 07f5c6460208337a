"""How offloaded weights and KV pages came to a stage's device: measured, beside the plan."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["OffloadUse", "PageMoveUse"]


@dataclass(frozen=True, slots=True)
class OffloadUse:
    """Streaming of one stage since it was opened; rates are of the time in which bytes flowed."""

    bytes_per_step: int = 0  # brought to the device for each step, whatever its rows
    wait_s: float = 0.0  # compute stood still before a layer until its weights were there
    host_bytes_per_s: float | None = None  # pinned host memory to the GPU; None: nothing came so
    disk_bytes_per_s: float | None = None  # from the disk, page cache included; None: nothing
    disk_bytes: int = 0  # read so far, those of the embedding's rows included
    planned_host_bytes_per_s: float | None = None  # what the plan reckoned with
    planned_disk_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class PageMoveUse:
    """KV pages of preempted sequences that a stage moved since it was opened."""

    num_saved: int = 0  # sequences whose pages went to host memory
    saved_bytes: int = 0
    restored_bytes: int = 0  # back
    bytes_per_s: float | None = None  # while bytes flowed, either way; None: none did
