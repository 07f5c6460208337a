"""A CPU stream whose captures behave like CUDA graphs: nothing is computed while one is recorded,
and a replay repeats the same operations on the same addresses with the same numbers from Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpipipe.clock import Clock
from mpipipe.progress import ProgressEngine
from mpipipe.stage.cpu_stream import CpuStream

__all__ = ["PooledStream", "ReplayingStream", "Tape"]


@dataclass
class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
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

    def made(self) -> list[torch.Tensor]:
        """The memory of everything that the recorded calls made, as bytes."""
        storages: dict[int, torch.UntypedStorage] = {}
        given: set[int] = set()
        for _, args, _, result in self.calls:
            given.update(_storage(t).data_ptr() for t in args if isinstance(t, torch.Tensor))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor) and _storage(tensor).data_ptr() not in given:
                    storages[_storage(tensor).data_ptr()] = _storage(tensor)
        return [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages.values()]

    def play(self) -> None:
        """The same calls on the same addresses."""
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            old = result if isinstance(result, tuple | list) else (result,)
            new = again if isinstance(again, tuple | list) else (again,)
            for target, source in zip(old, new, strict=True):
                if isinstance(target, torch.Tensor) and target.data_ptr() != source.data_ptr():
                    target.copy_(source)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


class ReplayingStream(CpuStream):
    """A CPU stream whose captures behave like CUDA graphs."""

    num_captures = 0

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:  # type: ignore[override]
        """Record `work`, undo it, and return what repeats it."""
        self.num_captures += 1
        tape = Tape()
        with tape:
            work()
        tape.rewind()
        self._recorded(tape)

        def replay() -> None:
            with torch.inference_mode():
                self._before_replay(tape)
                tape.play()

        return replay

    def _recorded(self, tape: Tape) -> None:
        """For streams that keep account of their captures."""

    def _before_replay(self, tape: Tape) -> None:
        """For streams whose captures get in each other's way."""


class PooledStream(ReplayingStream):
    """The worst that a memory pool shared by all captures allows: a replay spoils what others made.

    For one stage alone: stages of several ranks have pools of their own.
    """

    def __init__(self, device: torch.device, clock: Clock, progress: ProgressEngine) -> None:
        super().__init__(device, clock, progress)
        self._tapes: list[Tape] = []

    def _recorded(self, tape: Tape) -> None:
        self._tapes.append(tape)

    def _before_replay(self, tape: Tape) -> None:
        for other in self._tapes:
            if other is not tape:
                for memory in other.made():
                    memory.fill_(0x55)
