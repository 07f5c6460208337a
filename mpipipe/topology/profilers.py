"""Which profiler watches this process: read from the environment alone."""

from __future__ import annotations

from collections.abc import Mapping

from mpipipe.types import ProfilerName

__all__ = ["PROFILER_VARIABLE", "listens_for_ranges", "profiler_problem"]

# launch/profile_rank.sh says here what it started the rank under, or why under nothing.
PROFILER_VARIABLE = "MPIPIPE_PROFILER"
# What nsys and its like set in the processes that they watch.
_LISTENERS = ("NVTX_INJECTION64_PATH", "CUDA_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID")


def listens_for_ranges(environ: Mapping[str, str]) -> bool:
    """Whether a program such as nsys takes the NVTX ranges of this process."""
    return any(environ.get(name) for name in _LISTENERS)


def profiler_problem(tool: ProfilerName, environ: Mapping[str, str], host: str) -> str:
    """Why a rank on `host` is not profiled as `profile.tool` asks, a sentence; empty: it is."""
    if tool in {"none", "torch"}:
        return ""
    started = environ.get(PROFILER_VARIABLE, "")
    if started == tool or (tool == "nsys" and listens_for_ranges(environ)):
        return ""
    asked = f'profile.tool = "{tool}", but'
    if started == "missing":
        return (
            f"{asked} {tool} is not to be found on {host}, so the run goes on without it: load its "
            "module (MPIPIPE_MODULES in launch/site.env), or add it to the image"
        )
    if started == "refused":
        return (
            f"{asked} {tool} may not record on {host}, so the run goes on without it: most likely "
            "/proc/sys/kernel/perf_event_paranoid is above 2 there, which the site can change"
        )
    by_hand = f"mpirun -n 2 launch/profile_rank.sh {tool} FOLDER mpipipe run …"
    return (
        f"{asked} this rank does not run under it: launch/run.sh starts it in a Slurm job; by hand "
        f"it goes before mpipipe, {by_hand}, with output.dir for FOLDER"
    )
