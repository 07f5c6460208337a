"""`mpipipe plan --measure`: times the model on the ranks of this launch, and prints a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mpipipe.bench.profile import Kept, measure_profiles
from mpipipe.clock import MonotonicClock
from mpipipe.errors import EXIT_OK, ConfigError
from mpipipe.metrics.boot import BootTimeline
from mpipipe.progress import run_async
from mpipipe.topology.process import process_age_s

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mpipipe.planning.profile import Profile, StepPart

__all__ = ["measure_command"]

_WIDTH = 100  # where the output is no terminal, as under mpirun


def measure_command(
    config: Path, overrides: Sequence[str], others: Mapping[str, object], *, debug: bool
) -> int:
    """Measure, keep the profile, and print what was measured; returns the exit code.

    `others`: options of `mpipipe plan` that say what else is planned for; None: not given.

    Raises:
        ConfigError: one of these is given.
        MpipipeError: what `mpipipe run` would refuse, or the profile cannot be written.
    """
    if given := [name for name, value in others.items() if value is not None]:
        raise ConfigError(
            f"--measure times the ranks of this launch, and {given[0]} plans for other ones or for "
            "other work: leave one of them out (mpirun -n 2 mpipipe plan --measure … for two)"
        )
    clock = MonotonicClock()
    boot = BootTimeline(clock, clock.now_s() - (process_age_s() or 0.0))
    kept = run_async(measure_profiles(config, overrides, boot, debug=debug))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    for each in kept:
        _print(each, console)
    return EXIT_OK


def _print(kept: Kept, console: Console) -> None:
    profile, key = kept.profile, kept.profile.key
    sharing = f", {key.ranks_per_host} ranks on a host" if key.ranks_per_host > 1 else ""
    lanes = f", one of {key.num_lanes} lanes" if key.num_lanes > 1 else ""
    console.print(f"{key.shape}, {key.dtype}, {key.device}{sharing}{lanes}: milliseconds")
    table = Table("step", "tokens", "context", "a layer", "LM head", "embedding", "the rest")
    for name, part in (("decode", profile.decode), ("prefill", profile.prefill)):
        for row in _rows(part):
            table.add_row(name, *row)
    console.print(table)
    for line in _rates(profile):
        console.print(line)
    console.print(f"Later plans and runs find it in {kept.path}", soft_wrap=True)


def _rows(part: StepPart) -> list[tuple[str, ...]]:
    by_rows = [{p.rows: p.seconds for p in points} for points in (part.head, part.embedding)]
    rest = {point.rows: point.seconds for point in part.step}
    return [
        (
            str(point.tokens),
            f"{point.context_tokens:g}",
            _ms(point.seconds),
            *(_ms(times[point.tokens]) for times in (*by_rows, rest)),
        )
        for point in part.layer
    ]


def _rates(profile: Profile) -> list[str]:
    lines = [
        f"hop of {hop.num_bytes:,} bytes{' between hosts' if hop.crosses_hosts else ''}: "
        f"{_ms(hop.seconds)} ms"
        for hop in sorted(profile.hops, key=lambda hop: hop.num_bytes)
    ]
    if profile.host_to_device_bytes_per_s:
        lines.append(f"host to GPU: {profile.host_to_device_bytes_per_s / 1e9:.1f} GB/s")
    lines.append(
        f"load: {profile.load_bytes_per_s / 1e9:.2f} GB/s and {profile.load_fixed_s:.2f} s; "
        f"start until then: {profile.start_s:.1f} s"
    )
    return lines


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"
