"""What must be alike on all ranks, and the sentence that says what is not. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.control_plane.messages import Hello

__all__ = ["find_mismatch"]

_SAME_INSTALLATION = (
    "different installations were started: install the same version of mpipipe on every host"
)
_SAME_CONFIGURATION = (
    "they read different configurations: give every rank the same file and the same overrides, and "
    "check that the file is the same on both hosts"
)


def find_mismatch(hellos: Sequence[Hello]) -> str | None:
    """The first difference to the first of `hellos` as a sentence; None when all fit."""
    for hello in hellos[1:]:
        for what, head_value, value, remedy in _compared(hellos[0], hello):
            if head_value != value:
                return (
                    f"rank {hellos[0].rank} on {hellos[0].host} has {what} {head_value}, but rank "
                    f"{hello.rank} on {hello.host} has {value}; {remedy}"
                )
    return None


def _compared(head: Hello, other: Hello) -> tuple[tuple[str, object, object, str], ...]:
    """(what it is, the head's value, the other's value, what to do) in order of explanation."""
    return (
        (
            "protocol version",
            head.protocol_version,
            other.protocol_version,
            _SAME_INSTALLATION,
        ),
        ("package version", head.package_version, other.package_version, _SAME_INSTALLATION),
        (
            "a world of size",
            head.world_size,
            other.world_size,
            "they belong to different launches: start all ranks with one mpirun or srun command",
        ),
        (
            "configuration hash",
            head.config_hash,
            other.config_hash,
            _SAME_CONFIGURATION,
        ),
    )
