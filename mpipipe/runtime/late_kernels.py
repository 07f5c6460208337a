"""What Triton compiles after a stage is ready, and so in the middle of a run.

All that a plan launches is compiled at the start (`kernels_ahead`, trial steps). Where something
was left out, a step takes as long as its compilation, and the log says which kernel it was.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpipipe.metrics.log import Logger

__all__ = ["late_kernels_told"]


@contextmanager
def late_kernels_told(log: Logger) -> Iterator[None]:
    """While open, each kernel that is compiled, and not found in Triton's cache, is a warning."""
    triton = sys.modules.get("triton")
    compilation = getattr(getattr(triton, "knobs", None), "compilation", None)
    if compilation is None:  # nothing launches kernels here
        yield
        return

    def told(*, src: Any, times: Any, cache_hit: bool, **_: object) -> None:
        if cache_hit:
            return
        name, seconds = getattr(src, "name", "?"), times.total / 1e6
        log.warning(
            "late_kernel",
            message=f"{name} was compiled in the middle of the run, in {seconds:.2f} s, and all "
            "stages waited for it: the next run finds it in Triton's cache. Please report it",
            kernel=name,
            seconds=round(seconds, 3),
        )

    before, compilation.listener = compilation.listener, told
    try:
        yield
    finally:
        compilation.listener = before
