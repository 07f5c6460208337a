"""A CPU lane whose captures behave like CUDA graphs: nothing is computed while one is recorded, and
a replay repeats the same operations on the same addresses with the same numbers from Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpipipe.stage.ahead.lane import CpuLane

__all__ = ["ReplayingLane"]


@dataclass
class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What torch was asked to do, on which tensors: no number that Python saw changes later."""

    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=list)
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for argument in func._schema.arguments:
            tensor = given.get(argument.name)
            changes = argument.alias_info is not None and argument.alias_info.is_write
            if changes and isinstance(tensor, torch.Tensor):
                self._keep(tensor)
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def _keep(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.kept:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.kept[storage.data_ptr()] = (whole, whole.clone())

    def rewind(self) -> None:
        """As before the recording: a capture computes nothing."""
        for whole, before in self.kept.values():
            whole.copy_(before)

    def play(self) -> None:
        """The same calls on the same addresses."""
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            old = result if isinstance(result, tuple | list) else (result,)
            new = again if isinstance(again, tuple | list) else (again,)
            for target, source in zip(old, new, strict=True):
                if isinstance(target, torch.Tensor) and target.data_ptr() != source.data_ptr():
                    target.copy_(source)


class ReplayingLane(CpuLane):
    """A CPU lane whose captures behave like CUDA graphs."""

    num_captures = 0

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:  # type: ignore[override]
        """Record `work`, undo it, and return what repeats it."""
        self.num_captures += 1
        tape = _Tape()
        with tape:
            work()
        tape.rewind()

        def replay() -> None:
            with torch.inference_mode():
                tape.play()

        return replay
