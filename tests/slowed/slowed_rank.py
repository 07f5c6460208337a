"""`mpipipe` as a rank that something holds up: `SLOWED` in its environment says what and which.

`stage:<rank>:<seconds>`: each step of that rank sleeps so long. `read:<rank>:<bytes per second>`:
its weights come at no more than that. `*` for the rank: all of them. Several, with commas between.
The modules are changed when the run imports them, and not before, so that its boot is a run's own.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from mpipipe.cli.main import main
from mpipipe.topology.launcher import detect


class AfterImport(MetaPathFinder):
    """Changes a module as soon as it is imported."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._change = change

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            self._change(module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def sleepy(seconds: float) -> Callable[[ModuleType], None]:
    """Each step of a stage sleeps, in the thread that computes it."""

    def change(module: ModuleType) -> None:
        for name in ("decode", "prefill"):
            compute = getattr(module.StageEngine, name)

            def slowed(*args: Any, compute: Callable[..., Any] = compute) -> Any:
                time.sleep(seconds)
                return compute(*args)

            setattr(module.StageEngine, name, slowed)

    return change


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
            sys.meta_path.insert(0, AfterImport(where, changed(float(amount))))
    main()
