"""Which way NCCL goes between two ranks, read from its own log: nothing else tells.

NCCL reads its settings once per process, at its first communicator. A user's own NCCL_DEBUG is left
alone, and then nothing is known. `checks.measured` says whether a way is a good one.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["nccl_routes", "recorded_nccl"]

_SETTINGS = ("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_DEBUG_FILE")
# `Channel 00/0 : 0[0] -> 1[1] [send] via NET/Socket/0`; the numbers before brackets are ranks.
_CHANNEL = re.compile(
    r"Channel \d+(?:/\d+)? : (\d+)\[[^\]]*\] -> (\d+)\[[^\]]*\](?: \[\w+\])? via (\S+)"
)


@contextlib.contextmanager
def recorded_nccl() -> Iterator[Path]:
    """The file that NCCL logs to meanwhile; it may stay empty. Removed at the end."""
    with tempfile.TemporaryDirectory(prefix="mpipipe-doctor-") as folder:
        path = Path(folder) / "nccl.log"
        if any(name in os.environ for name in _SETTINGS):
            yield path
            return
        values = ("INFO", "INIT,P2P,SHM,NET", str(path))
        os.environ.update(zip(_SETTINGS, values, strict=True))
        try:
            yield path
        finally:
            for name in _SETTINGS:
                os.environ.pop(name, None)


def nccl_routes(path: Path) -> dict[tuple[int, int], str]:
    """(source, target) → e.g. "P2P/CUMEM", "SHM/direct/direct", "NET/Socket/0", "NET/IB/0"."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return {}
    return {(int(found[1]), int(found[2])): found[3] for found in _CHANNEL.finditer(text)}
