"""What goes through memory that the lanes' GPUs share, and what NCCL adds up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpipipe.data_plane.shared_buffer import SharedBuffer, _adds_up

BUFFER = SharedBuffer(torch.zeros(256 << 10, dtype=torch.uint8), "lanes")


@pytest.mark.parametrize(
    ("tensor", "taken"),
    [
        (torch.zeros(1, 4096, dtype=torch.bfloat16), True),
        (torch.zeros(32, 4096, dtype=torch.bfloat16), True),
        (torch.zeros(33, 4096, dtype=torch.bfloat16), False),  # NCCL moves less
        (torch.zeros(1, 4096, dtype=torch.float32), True),
        (torch.zeros(1, 4096, dtype=torch.float16), False),  # torch's kernel does not add it
        (torch.zeros(1, 4, dtype=torch.bfloat16), False),  # half of what a thread takes
        (torch.zeros(0, 4096, dtype=torch.bfloat16), False),
        (torch.zeros(2, 4096, dtype=torch.bfloat16)[1:], False),
    ],
)
def test_small_sums_of_whole_tensors_go_through_it(tensor: torch.Tensor, taken: bool) -> None:
    assert BUFFER.takes(tensor) is taken


def test_it_is_viewed_as_what_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Size, torch.dtype, str]] = []

    def add(memory: torch.Tensor, partial: torch.Tensor, kind: str, group: str) -> torch.Tensor:
        seen.append((memory.shape, memory.dtype, group))
        assert kind == "sum"
        return partial

    monkeypatch.setattr(torch.ops.symm_mem, "one_shot_all_reduce_copy", add)
    BUFFER.sum_of(torch.zeros(3, 8, dtype=torch.bfloat16))
    assert seen == [(torch.Size([3, 8]), torch.bfloat16, "lanes")]


class Pair:
    """A group of two lanes, of which this is the second."""

    @staticmethod
    def rank() -> int:
        return 1

    @staticmethod
    def size() -> int:
        return 2


@pytest.mark.parametrize(("factor", "is_right"), [(1.5, True), (1.0, False)])
def test_a_trial_sum_tells_whether_the_lanes_are_added(
    factor: float, is_right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first lane has half of what the second has, so the sum is 1.5 times as much."""

    def add(_: object, partial: torch.Tensor, *__: object) -> torch.Tensor:
        return partial * factor

    monkeypatch.setattr(torch.ops.symm_mem, "one_shot_all_reduce_copy", add)
    group: Any = Pair()
    assert _adds_up(BUFFER, group, torch.device("cpu")) is is_right
