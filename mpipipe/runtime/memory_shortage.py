"""One sentence for every way in which memory does not do: what was needed, and what there was.

`errors.is_out_of_memory` recognises it; `planning` plans with what there is.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path

from mpipipe.errors import EnvironmentSetupError, MpipipeError, is_out_of_memory
from mpipipe.planning.memory import gib
from mpipipe.topology.host import memory_available_bytes, memory_limit_bytes, read_text

__all__ = ["memory_shortage"]


def memory_shortage(
    error: BaseException, needs: Mapping[str, int], *, root: Path = Path("/")
) -> EnvironmentSetupError | None:
    """`error` as the user's sentence when memory did not do; None when that is not what it says.

    Args:
        error: as it came, perhaps already made into an error of ours.
        needs: bytes of this rank by what they are for, e.g. "weights"; empty: not known yet.
        root: where /proc and /sys are.
    """
    if isinstance(error, EnvironmentSetupError) or not is_out_of_memory(error):
        return None
    first = error
    while isinstance(first, MpipipeError) and first.__cause__ is not None:
        first = first.__cause__
    said = str(first).strip().partition("\n")[0] or type(first).__name__
    wanted = " and ".join(f"{gib(size)} of {what}" for what, size in needs.items())
    needed = f"this rank needs {wanted}, beside libraries and the work space of steps; "
    on_gpu = "CUDA" in said
    sentence = f"memory ran out ({said}): {needed if needs else ''}"
    return EnvironmentSetupError(f"{sentence}{'' if on_gpu else _there_is(root)}{_remedy(on_gpu)}")


def _there_is(root: Path) -> str:
    """What limits this process, tightest kind first."""
    parts = []
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        words = read_text(root / "proc/self/statm").split()
        used = int(words[0]) * resource.getpagesize() if words else 0
        parts.append(f"`ulimit -v` allows {gib(limit)} of addresses, {gib(used)} are used")
    if (group_limit := memory_limit_bytes(root)) is not None:
        parts.append(f"the job's memory limit is {gib(group_limit)}")
    parts.append(f"{gib(memory_available_bytes(root))} are available here")
    return ", ".join(parts) + "; "


def _remedy(on_gpu: bool) -> str:
    if on_gpu:
        return (
            "most likely another process took some meanwhile: lower memory.gpu_memory_fraction, "
            "memory.kv_cache_bytes or pipeline.max_tokens_per_step"
        )
    return (
        "raise the limit (`ulimit -v unlimited`, `sbatch --mem`), spread the model over more ranks "
        "or nodes, or lower memory.kv_cache_bytes or pipeline.max_tokens_per_step"
    )
