"""Leaving NCCL's groups, without NCCL."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpipipe.data_plane import nccl_groups
from mpipipe.data_plane.nccl_groups import NcclGroups


class Counting:
    """A store that counts who has left."""

    def __init__(self, num_left: int) -> None:
        self._num_left = num_left

    def add(self, key: str, amount: int) -> int:
        assert key
        self._num_left += amount
        return self._num_left


def groups(store: Any, rank: int, monkeypatch: pytest.MonkeyPatch) -> NcclGroups:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr("mpipipe.data_plane.nccl_groups.dist.destroy_process_group", lambda: None)
    return NcclGroups({}, None, None, store, rank, 3, torch.device("cuda", 0))


def test_the_head_does_not_wait_without_end_for_a_rank_that_never_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nccl_groups, "LEAVE_LIMIT_S", 0.01)
    with pytest.raises(TimeoutError, match="1 of 3 ranks"):
        groups(Counting(1), 0, monkeypatch).leave()  # the head is the second


def test_the_head_leaves_last_and_the_others_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_groups, "LEAVE_LIMIT_S", 0.01)
    groups(Counting(2), 0, monkeypatch).leave()
    groups(Counting(0), 1, monkeypatch).leave()
