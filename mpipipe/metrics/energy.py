"""The energy that a device has used, from its counter or from its power. Pure."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EnergyMeter"]


@dataclass(slots=True)
class EnergyMeter:
    """The energy that a device has used since the first reading.

    From its own counter where it has one, else from its power: each reading counts for half of the
    time to the readings before and after it.
    """

    _first_j: float | None = None
    _last_j: float | None = None
    _at_s: float | None = None
    _power_w: float | None = None
    _summed_j: float | None = None

    def read(self, now_s: float, energy_j: float | None, power_w: float | None) -> None:
        """A reading; None: the device does not tell."""
        if energy_j is not None:
            self._first_j = energy_j if self._first_j is None else self._first_j
            self._last_j = energy_j
        if power_w is None:
            return
        if self._at_s is not None and self._power_w is not None:
            between_j = (power_w + self._power_w) / 2 * (now_s - self._at_s)
            self._summed_j = (self._summed_j or 0.0) + between_j
        self._at_s, self._power_w = now_s, power_w

    @property
    def energy_j(self) -> float | None:
        """Joules between the first and the latest reading; None: neither is told."""
        if self._first_j is not None and self._last_j is not None:
            return self._last_j - self._first_j
        return self._summed_j
