"""The memory of a stage's cache: what the plan says, and what becomes of memory that is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mpipipe.errors import EnvironmentSetupError
from mpipipe.kv_cache.base import ContiguousKVCache
from mpipipe.kv_cache.host_pages import page_bytes
from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.planning.plan import KvInHost, PipelinePlan
from mpipipe.runtime.kv_memory import open_kv_memory
from mpipipe.weights.pinned_memory import PinnedMemory
from tests.contract.engine_pipeline import engine_plan
from tests.contract.tiny_models import TinyModel

CPU = torch.device("cpu")


@pytest.fixture
def plan(tiny: Callable[[str], TinyModel]) -> PipelinePlan:
    return replace(engine_plan(1, num_pages=20), model_path=str(tiny("llama").folder))


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA does where the system lets a job lock little memory."""

    def take(self: PinnedMemory, num_bytes: int) -> torch.Tensor:
        self.refused_bytes += num_bytes
        self.reason = "out of memory"
        return torch.empty(num_bytes, dtype=torch.uint8)

    monkeypatch.setattr(PinnedMemory, "take", take)


def test_there_is_host_memory_for_as_many_pages_as_are_planned(plan: PipelinePlan) -> None:
    none = open_kv_memory(plan, plan.stages[0], CPU, head_major=False)
    assert none.host_memory is None
    assert not none.host_bytes
    some = open_kv_memory(replace(plan, num_host_pages=7), plan.stages[0], CPU, head_major=False)
    assert isinstance(some.cache, PagedKVCache)
    assert some.host_memory is not None
    assert some.host_bytes == some.host_memory.nbytes == 7 * page_bytes(some.cache)
    assert not some.warning
    some.close()


def test_layers_have_their_pages_in_host_memory(plan: PipelinePlan) -> None:
    stage = replace(plan.stages[0], kv_in_host=KvInHost((1, 2)))
    memory = open_kv_memory(plan, stage, CPU, head_major=False)
    assert isinstance(memory.cache, PagedKVCache)
    assert memory.host_bytes == memory.cache.host_bytes == memory.cache.num_bytes()
    assert len(memory.cache.keys) == 4


def test_pages_that_could_not_be_pinned_are_told_with_their_cost(
    plan: PipelinePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch)
    memory = open_kv_memory(replace(plan, num_host_pages=7), plan.stages[0], CPU, head_major=False)
    assert memory.host_memory is not None
    for word in ("could not be pinned (out of memory)", "ulimit -l", "memory.kv_host_bytes = 0"):
        assert word in memory.warning


def test_layers_whose_pages_cannot_be_pinned_end_the_start(
    plan: PipelinePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch)
    stage = replace(plan.stages[0], kv_in_host=KvInHost((1, 2)))
    with pytest.raises(EnvironmentSetupError, match=r"2 layers of stage 0 .*ulimit -l"):
        open_kv_memory(plan, stage, CPU, head_major=False)


def test_a_contiguous_cache_has_none(plan: PipelinePlan) -> None:
    whole = replace(plan, kv_cache="contiguous")
    memory = open_kv_memory(whole, plan.stages[0], CPU, head_major=False)
    assert isinstance(memory.cache, ContiguousKVCache)
    assert not memory.host_bytes
