"""A watcher of a staging: notes what it is told, and may stop it."""

from __future__ import annotations

from mpipipe.errors import StoppedError

__all__ = ["SilentView"]


class SilentView:
    """Counts; raises StoppedError when so many bytes were written."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.parts: dict[str, int] = {}
        self._part = ""
        self._stop_after = stop_after

    def begin(self, what: str, num_bytes: int) -> None:
        """A part begins."""
        self._part = what
        self.parts[what] = 0

    def took(self, num_bytes: int) -> None:
        """Count."""
        self.parts[self._part] += num_bytes
        written = self.parts.get("writing", 0)
        if self._stop_after is not None and written >= self._stop_after:
            raise StoppedError("stopped")
