"""Early launches of the kernels, allowed or not: to measure the difference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mpipipe.models.kernels import launch

__all__ = ["early_launch"]


@contextmanager
def early_launch(allowed: bool) -> Iterator[None]:
    """Allow early launches, or not, for what is launched within."""
    before, launch.EARLY_LAUNCH = launch.EARLY_LAUNCH, allowed
    try:
        yield
    finally:
        launch.EARLY_LAUNCH = before
