"""mpipipe: pipeline-parallel LLM inference over MPI ranks.

Importing this package imports neither torch nor MPI; `Pipeline` is loaded on first use.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

from mpipipe._version import __version__

if TYPE_CHECKING:
    from mpipipe.runtime.pipeline import Pipeline

__all__ = ["Pipeline", "__version__"]

IMPORTED_S = perf_counter()  # on the monotonic clock: until here a boot is Python's


def __getattr__(name: str) -> Any:
    if name == "Pipeline":
        from mpipipe.runtime.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'mpipipe' has no attribute {name!r}")
