"""`mpipipe` as a rank that something holds up: `SLOWED` in its environment says what and which.

`stage:<rank>:<seconds>`: each step of that rank sleeps so long. `read:<rank>:<bytes per second>`:
its weights come at no more than that. `held:<rank>:<file>`: each step sleeps once the file has
grown since the rank's start, until it is gone: a run is then in its middle, however long a test
takes to touch it. `*` for the rank: all of them. Several, with commas between.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from mpipipe.cli.main import main
from mpipipe.topology.launcher import detect
from tests.slowed.after_import import after_import, before_each_step

HELD_STEP_S = 0.05  # a step in flight delays the answer to a stop; a hundred are left, always


def sleepy(seconds: str) -> Callable[[ModuleType], None]:
    """Each step of a stage sleeps."""
    return before_each_step(lambda: float(seconds))


def held(file: str) -> Callable[[ModuleType], None]:
    """Each step of a stage sleeps while the file is larger than now."""
    path = Path(file)

    def size() -> int:
        return path.stat().st_size if path.exists() else 0

    before = size()
    return before_each_step(lambda: HELD_STEP_S if size() > before else 0.0)


def throttled(bytes_per_s: str) -> Callable[[ModuleType], None]:
    """Each piece is read no faster than a disk of that speed would deliver it."""
    rate = float(bytes_per_s)

    def change(module: ModuleType) -> None:
        read = module.FileReaders.read

        def slowed(self: Any, extent: Any, *rest: Any) -> Any:
            time.sleep(extent.num_bytes / rate)
            return read(self, extent, *rest)

        module.FileReaders.read = slowed

    return change


KINDS = {
    "stage": ("mpipipe.stage.engine", sleepy),
    "read": ("mpipipe.weights.readers", throttled),
    "held": ("mpipipe.stage.engine", held),
}

if __name__ == "__main__":
    own = str(detect(os.environ).rank or 0)
    for word in filter(None, os.environ.get("SLOWED", "").split(",")):
        kind, rank, amount = word.split(":", 2)
        if rank in {"*", own}:
            where, changed = KINDS[kind]
            after_import(where, changed(amount))
    main()
