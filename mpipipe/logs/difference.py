"""What is different between two runs: configuration, plan, environment, versions, figures. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mpipipe.logs.reading import Line, number

__all__ = ["Difference", "find_differences"]

# Of the manifest, by what they are called here. What differs between any two runs is left out.
_SETTINGS = {
    "config": "configuration",
    "plan": "plan",
    "versions": "versions",
    "launch": "launch",
    "environment": "environment",
    "nodes": "nodes",
    "git": "code",
    "mpipipe": "code",
    "hashes": "hashes",
    "argv": "command",
}
_FIGURES = ("phases", "requests", "time", "output_tokens_per_s", "total_tokens_per_s",
            "bubble_ratio", "steady_bubble_ratio", "num_preemptions", "num_shared_tokens",
            "drafts", "itl_p50_s", "itl_p95_s", "energy_j", "ranks")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that is not the same."""

    group: str  # configuration, environment, figures …
    name: str  # with dots
    first: Any  # None: not there
    second: Any

    @property
    def ratio(self) -> float | None:
        """Second over first, of two numbers."""
        if not isinstance(self.first, int | float) or not isinstance(self.second, int | float):
            return None
        return self.second / self.first if self.first else None


def find_differences(
    first: tuple[Line, Line], second: tuple[Line, Line], *, least_change: float = 0.0
) -> list[Difference]:
    """Compare two runs, each given as manifest and metrics.

    Figures that changed by less than `least_change` (a share) are left out.
    """
    found: list[Difference] = []
    for key, group in _SETTINGS.items():
        mine = dict(_flat(first[0].get(key), key))
        theirs = dict(_flat(second[0].get(key), key))
        found += [
            Difference(group, name, mine.get(name), theirs.get(name))
            for name in dict.fromkeys([*mine, *theirs])
            if mine.get(name) != theirs.get(name)
        ]
    for key in _FIGURES:
        mine = dict(_flat(first[1].get(key), key))
        theirs = dict(_flat(second[1].get(key), key))
        for name in dict.fromkeys([*mine, *theirs]):
            one = Difference("figures", name, mine.get(name), theirs.get(name))
            if one.first != one.second and _is_large(one, least_change):
                found.append(one)
    return found


def _is_large(one: Difference, least_change: float) -> bool:
    first, second = number({"": one.first}, ""), number({"": one.second}, "")
    if first is None or second is None:
        return True
    return abs(second - first) >= least_change * max(abs(first), abs(second))


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The leaves of a JSON value, each with its path."""
    if (named := _named(value)) is not None:
        for key, inner in named.items():
            yield f"{name}[{key}]", inner
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}")
    elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{index}]")
    elif value is not None:
        yield name, value


def _named(value: Any) -> dict[str, Any] | None:
    """A list of settings with reasons, or of boot events, by name; None: it is something else.

    The place in such a list, and when an event was, say nothing about what differs. The value of a
    setting is in the configuration.
    """
    if not isinstance(value, list) or not all(isinstance(inner, dict) for inner in value):
        return None
    if value and all({"setting", "reason"} <= inner.keys() for inner in value):
        return {str(inner["setting"]): inner["reason"] for inner in value}
    if value and all({"name", "seconds"} <= inner.keys() for inner in value):
        seconds: dict[str, float] = {}
        for inner in value:
            name = str(inner["name"])
            seconds[name] = seconds.get(name, 0.0) + (number(inner, "seconds") or 0.0)
        return seconds
    return None
