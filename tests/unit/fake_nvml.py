"""A stand-in for the module pynvml: cards in a host, as the driver would tell of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

MIB = 2**20


class FakeNvmlError(Exception):
    """What every function raises that a card, a driver or a slice does not support."""


@dataclass(eq=False)
class FakeCard:
    """A GPU, or a slice of one: then `part_of` is set. An `answer` that lacks is not supported."""

    uuid: str
    name: str = "NVIDIA H200"
    part_of: FakeCard | None = None
    answers: dict[str, Any] = field(default_factory=dict)
    num_asked: int = 0  # for any of them


def memory(total_mib: int, free_mib: int) -> SimpleNamespace:
    total, free = total_mib * MIB, free_mib * MIB
    return SimpleNamespace(total=total, free=free, used=total - free)


class FakeNvml:
    """The functions that mpipipe asks; `lost`: numbers of cards that do not answer any more."""

    NVMLError = FakeNvmlError

    def __init__(
        self,
        *cards: FakeCard,
        lost: tuple[int, ...] = (),
        names: dict[int, str] | None = None,
        driver: bool = True,
    ) -> None:
        self.cards = cards
        self.lost = lost
        self.names = names or {}
        self.driver = driver
        self.num_open = 0

    def nvmlInit(self) -> None:
        if not self.driver:
            raise FakeNvmlError("Driver Not Loaded")
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def _whole(self) -> list[FakeCard]:
        return [card for card in self.cards if card.part_of is None]

    def nvmlDeviceGetCount(self) -> int:
        return len(self._whole())

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:
        if index in self.lost:
            raise FakeNvmlError("GPU is lost")
        return self._whole()[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeCard:
        for card in self.cards:
            if card.uuid == uuid:
                return card
        raise FakeNvmlError("Not Found")

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, card: FakeCard) -> FakeCard:
        if card.part_of is None:
            raise FakeNvmlError("Invalid Argument")
        return card.part_of

    def nvmlDeviceGetName(self, card: FakeCard) -> str:
        return card.name

    def nvmlDeviceGetUUID(self, card: FakeCard) -> str:
        return card.uuid

    def nvmlSystemGetProcessName(self, pid: int) -> str:
        if pid not in self.names:
            raise FakeNvmlError("Not Found")
        return self.names[pid]

    def __getattr__(self, function: str) -> Any:
        """Any other function of the library answers what the card was given for it."""
        if not function.startswith("nvml"):
            raise AttributeError(function)

        def answer(card: FakeCard, *arguments: int) -> Any:
            key = function if not arguments else f"{function}:{arguments[0]}"
            card.num_asked += 1
            if key not in card.answers:
                raise FakeNvmlError("Not Supported")
            return card.answers[key]

        return answer
