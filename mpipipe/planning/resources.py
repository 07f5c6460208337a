"""What planning reads of a rank's `Hello`, and the list of what each `auto` became.

Not here: any decision.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from mpipipe.config.schema import AUTO
from mpipipe.planning.plan import Resolved

__all__ = ["Decisions", "RankResources"]


class RankResources(Protocol):
    """One rank: where it is and what it may use. The GPU fields are empty without a GPU."""

    @property
    def rank(self) -> int:
        """Position in the world."""
        ...

    @property
    def world_size(self) -> int:
        """Ranks that were started."""
        ...

    @property
    def host(self) -> str:
        """Name of the host; equal names share cores and memory."""
        ...

    @property
    def num_cores(self) -> int:
        """Cores that the rank may use."""
        ...

    @property
    def memory_available_bytes(self) -> int:
        """Memory available on its host."""
        ...

    @property
    def gpu_index(self) -> int:
        """Its GPU among those visible to the process; -1: none."""
        ...

    @property
    def gpu_name(self) -> str:
        """As the driver calls it."""
        ...

    @property
    def gpu_uuid(self) -> str:
        """The same for two ranks on one GPU."""
        ...

    @property
    def gpu_capability(self) -> int:
        """Compute capability × 10."""
        ...

    @property
    def gpu_free_bytes(self) -> int:
        """Free memory of its GPU before anything was loaded."""
        ...

    @property
    def nccl_version(self) -> str:
        """Empty without NCCL."""
        ...

    @property
    def attention_backends(self) -> tuple[str, ...]:
        """Optional attention backends that import on this rank."""
        ...

    @property
    def gpu_pci(self) -> str:
        """PCI address of its GPU; the same for two slices (MIG) of one GPU. Empty: unknown."""
        ...

    @property
    def gpu_cpus(self) -> tuple[int, ...]:
        """CPUs near its GPU; empty: unknown."""
        ...

    @property
    def cores(self) -> tuple[tuple[int, ...], ...]:
        """Physical cores of its affinity mask, each as its CPUs; empty: unknown."""
        ...

    @property
    def num_allowed_cpus(self) -> int:
        """CPUs that the job may use on the host; more than the mask's: the rank is bound."""
        ...

    @property
    def gpu_problem(self) -> str:
        """Why there is no usable GPU, with the remedy; empty: there is one, or nobody looked."""
        ...


@dataclass(slots=True)
class Decisions:
    """Takes what was asked for, or notes what an `auto` became and why."""

    notes: list[Resolved] = field(default_factory=list)

    def count(self, setting: str, asked: int | str, value: int, reason: str) -> int:
        """`asked` when it is a number, else `value`, noted."""
        if isinstance(asked, int):
            return asked
        self.note(setting, str(value), reason)
        return value

    def text(self, setting: str, asked: str, value: str, reason: str) -> str:
        """`asked` unless it is `auto`, else `value`, noted."""
        if asked != AUTO:
            return asked
        self.note(setting, value, reason)
        return value

    def note(self, setting: str, value: str, reason: str) -> None:
        """A decision that does not follow from the setting alone."""
        self.notes.append(Resolved(setting, value, reason))
