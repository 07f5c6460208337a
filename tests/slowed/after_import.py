"""Changes to a module of mpipipe that take effect when a run imports it, and not before.

So the boot of a run that a test changes is a run's own. Not here: which changes.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["after_import", "before_each_step"]


def after_import(name: str, change: Callable[[ModuleType], None]) -> None:
    """Call `change` with the module `name` as soon as it is imported, now if it has been."""
    if name in sys.modules:
        change(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, change))


class _AfterImport(MetaPathFinder):
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


def before_each_step(sleep_s: Callable[[], float]) -> Callable[[ModuleType], None]:
    """For `mpipipe.stage.engine`: each step of a stage sleeps, in the thread that computes it."""

    def change(module: ModuleType) -> None:
        for name in ("decode", "prefill"):
            compute = getattr(module.StageEngine, name)

            def slowed(*args: Any, compute: Callable[..., Any] = compute) -> Any:
                time.sleep(sleep_s())
                return compute(*args)

            setattr(module.StageEngine, name, slowed)

    return change
