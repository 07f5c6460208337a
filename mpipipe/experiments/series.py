"""What the time series of a run tell: progress, use of devices, what disturbed it. Pure.

Only what was sampled while the run generated counts. The first sample of a rank tells its CPU use
since its process began, so it is left out where there are others.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpipipe.experiments.record import Flag, ProgressSample
from mpipipe.experiments.run_files import RankSamples, RunFiles

__all__ = ["cpu_percent", "energy_j", "flags_of", "gpu_percent", "progress", "sm_clock_mhz"]

MIN_GENERATE_S = 2.0  # a shorter run is mostly filling and draining the pipe
FOREIGN_PERCENT = 50.0  # of one core, used by others on a node
_ORIGIN_TOLERANCE_S = 0.5  # the first sample is taken a moment before "generating" is logged

# Reasons of `topology.nvml` that disturb no comparison: the clocks that were chosen for the GPU.
_HARMLESS = frozenset({"applications_clocks_setting", "display_clock_setting"})
# Prefill takes an H100 to its power limit in any run: 1,635 of 1,980 MHz in one sample of eight.
_POWER_CAP = "sw_power_cap"
_CAPPED_SHARE = 0.95  # of the highest clock that the run has seen


def progress(files: RunFiles) -> tuple[ProgressSample, ...]:
    """Tokens over time since generating began, as the head has sampled them."""
    head = next((rank for rank in files.ranks if rank.rank == 0), None)
    timed = [
        (time_s, count)
        for sample in (head.samples if head is not None else ())
        if (time_s := _number(sample.get("t_s"))) is not None
        and (count := _number(sample.get("num_output_tokens"))) is not None
    ]
    if not timed:
        return ()
    origin_s = files.generating_s if files.generating_s is not None else timed[0][0]
    return tuple(
        ProgressSample(round(max(0.0, time_s - origin_s), 3), int(count))
        for time_s, count in timed
        if time_s >= origin_s - _ORIGIN_TOLERANCE_S
    )


def flags_of(files: RunFiles) -> tuple[Flag, ...]:
    """What makes a measurement one to distrust."""
    found: list[Flag] = []
    if any(map(_is_throttled, files.ranks)):
        found.append("throttled")
    if any(percent > FOREIGN_PERCENT for percent in _foreign_percents(files.ranks)):
        found.append("foreign load")
    phases = (files.metrics or {}).get("phases") or {}
    generate_s = _number(phases.get("generate_s"))
    if generate_s is not None and generate_s < MIN_GENERATE_S:
        found.append("too short")
    return tuple(found)


def _is_throttled(rank: RankSamples) -> bool:
    """Heat or a brake at any moment; the power cap where it holds the clock down for long."""
    reasons = {
        str(reason)
        for sample in _steady(rank)
        for reason in (sample.get("gpu") or {}).get("throttle") or []
    } - _HARMLESS
    clocks = _gpu_values(rank, "sm_clock_mhz")
    if reasons == {_POWER_CAP} and clocks:
        return statistics.median(clocks) < _CAPPED_SHARE * max(clocks)
    return bool(reasons)


def _foreign_percents(ranks: Sequence[RankSamples]) -> list[float]:
    """Of one core, for every node whose number of cores is known: what its ranks did not use."""
    of_host: dict[str, list[RankSamples]] = defaultdict(list)
    for rank in ranks:
        of_host[rank.host].append(rank)
    found = []
    for on_host in of_host.values():
        used = _mean(on_host[0], "node_cpu_percent")
        own = [_mean(rank, "cpu_percent") for rank in on_host]
        num_cores = on_host[0].num_cores
        if used is not None and num_cores and None not in own:
            found.append(used * num_cores - sum(percent or 0.0 for percent in own))
    return found


def cpu_percent(files: RunFiles) -> float | None:
    """Of one core, mean over the ranks."""
    return _mean_of(_mean(rank, "cpu_percent") for rank in files.ranks)


def gpu_percent(files: RunFiles) -> float | None:
    """Share of the time in which a kernel ran, mean over the GPUs."""
    return _mean_of(_mean_of(_gpu_values(rank, "utilisation")) for rank in files.ranks)


def sm_clock_mhz(files: RunFiles) -> float | None:
    """Median over GPUs and time."""
    clocks = [clock for rank in files.ranks for clock in _gpu_values(rank, "sm_clock_mhz")]
    return statistics.median(clocks) if clocks else None


def energy_j(files: RunFiles) -> float | None:
    """Of all GPUs while generating; None: no card tells it."""
    return _number((files.metrics or {}).get("energy_j"))


def _steady(rank: RankSamples) -> Sequence[Mapping[str, Any]]:
    return rank.samples[1:] if len(rank.samples) > 1 else rank.samples


def _gpu_values(rank: RankSamples, name: str) -> list[float]:
    found = (_number((sample.get("gpu") or {}).get(name)) for sample in _steady(rank))
    return [value for value in found if value is not None]


def _mean(rank: RankSamples, name: str) -> float | None:
    return _mean_of(_number(sample.get(name)) for sample in _steady(rank))


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _number(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else None  # type: ignore[arg-type]
