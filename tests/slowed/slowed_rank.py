"""`mpipipe` as a rank that something holds up: `SLOWED` in its environment says what and which.

`stage:<rank>:<seconds>`: each step of that rank sleeps so long. `read:<rank>:<bytes per second>`:
its weights come at no more than that. `*` for the rank: all of them. Several, with commas between.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from mpipipe.cli.main import main
from mpipipe.topology.launcher import detect
from tests.slowed.after_import import after_import, before_each_step


def sleepy(seconds: float) -> Callable[[ModuleType], None]:
    """Each step of a stage sleeps."""
    return before_each_step(lambda: seconds)


def throttled(bytes_per_s: float) -> Callable[[ModuleType], None]:
    """Each piece is read no faster than a disk of that speed would deliver it."""

    def change(module: ModuleType) -> None:
        read = module.FileReaders.read

        def slowed(self: Any, extent: Any, *rest: Any) -> Any:
            time.sleep(extent.num_bytes / bytes_per_s)
            return read(self, extent, *rest)

        module.FileReaders.read = slowed

    return change


KINDS = {
    "stage": ("mpipipe.stage.engine", sleepy),
    "read": ("mpipipe.weights.readers", throttled),
}

if __name__ == "__main__":
    own = str(detect(os.environ).rank or 0)
    for word in filter(None, os.environ.get("SLOWED", "").split(",")):
        kind, rank, amount = word.split(":")
        if rank in {"*", own}:
            where, changed = KINDS[kind]
            after_import(where, changed(float(amount)))
    main()
