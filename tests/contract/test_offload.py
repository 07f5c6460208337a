"""Weights that do not stay on the device: whatever stands where, the tokens are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from mpipipe.kv_cache.base import KVCache
from mpipipe.models.adapter import StageModel
from mpipipe.models.operations import torch_operations
from mpipipe.planning.plan import StageOffload, StagePlan
from mpipipe.types import Tier
from tests.contract.tiny_models import (
    NUM_LAYERS,
    InProcessPipeline,
    Offloading,
    TinyModel,
    load_stage,
    paged_cache,
    save_tiny,
    split,
)

PROMPTS = ((5, 9, 3), (7, 7, 20, 31, 8, 90, 41, 12, 60, 33, 2), (4,))
ALL = tuple(range(NUM_LAYERS))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    torch.set_num_threads(1)

    @cache
    def make(name: str) -> TinyModel:
        return save_tiny(name, tmp_path_factory.mktemp(name))

    return make


@pytest.fixture
def offloading(tmp_path: Path) -> Iterator[Offloading]:
    opened = Offloading(tmp_path)
    yield opened
    opened.close()


def offloaded_stage(plan: StagePlan, offload: StageOffload) -> StagePlan:
    """`plan` with its part of `offload`."""
    own = range(plan.first_layer, plan.last_layer)
    host = tuple(number for number in offload.host_layers if number in own)
    disk = tuple(number for number in offload.disk_layers if number in own)
    return replace(plan, offload=replace(offload, host_layers=host, disk_layers=disk))


def stages(
    model: TinyModel, offload: StageOffload | None, offloading: Offloading, mode: str, number: int
) -> list[StageModel]:
    """All of `number` stages; each takes of `offload` what it has."""
    loaded = []
    for whole in split(number):
        plan = whole if offload is None else offloaded_stage(whole, offload)
        cache: KVCache | None = None
        operations = None
        if mode == "fast":
            cache = paged_cache(model.reference.config, plan.num_layers)
            operations = torch_operations()
        loaded.append(
            load_stage(
                model.folder,
                plan,
                mode=mode,
                cache=cache,
                operations=operations,
                offloading=None if offload is None else offloading,
            )
        )
    return loaded


PLACEMENTS = {
    "one on disk": StageOffload(disk_layers=(1,)),
    "two on disk": StageOffload(disk_layers=(1, 3)),
    "three on disk": StageOffload(disk_layers=(0, 1, 3)),
    "three on disk, three buffers": StageOffload(disk_layers=(0, 2, 3), num_buffers=3),
    "all on disk": StageOffload(disk_layers=ALL),
    "all on disk, three buffers": StageOffload(disk_layers=ALL, num_buffers=3),
    "all on disk, one buffer": StageOffload(disk_layers=ALL, num_buffers=1),
    "all in host memory": StageOffload(host_layers=ALL),
    "host and disk in turn": StageOffload(host_layers=(0, 2), disk_layers=(1, 3), num_buffers=3),
    "embedding on disk": StageOffload(embedding="disk"),
    "embedding in host memory": StageOffload(embedding="host"),
    "head on disk": StageOffload(head="disk"),
    "head in host memory": StageOffload(head="host", num_buffers=3),
    "everything on disk": StageOffload(disk_layers=ALL, embedding="disk", head="disk"),
    "everything, three buffers": StageOffload(
        host_layers=(1,), disk_layers=(0, 2, 3), embedding="host", head="disk", num_buffers=3
    ),
}


@pytest.mark.parametrize("mode", ["plain", "packed", "fast"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_tokens_are_the_same_wherever_weights_stand(
    placement: str, mode: str, tiny: Callable[[str], TinyModel], offloading: Offloading
) -> None:
    model = tiny("llama")
    wanted = [model.greedy(prompt, 8) for prompt in PROMPTS]
    for number in (1, 3):
        loaded = stages(model, PLACEMENTS[placement], offloading, mode, number)
        assert InProcessPipeline(loaded).generate(PROMPTS, 8, chunk=4) == wanted


@pytest.mark.parametrize("tiers", [("disk", "disk"), ("host", "disk"), ("device", "disk")])
@pytest.mark.parametrize("mode", ["plain", "packed", "fast"])
def test_a_head_that_is_tied_stands_with_the_embedding(
    mode: str,
    tiers: tuple[Tier, Tier],
    tiny: Callable[[str], TinyModel],
    offloading: Offloading,
) -> None:
    model = tiny("llama-tied")
    wanted = [model.greedy(prompt, 8) for prompt in PROMPTS]
    offload = StageOffload(disk_layers=(2,), embedding=tiers[0], head=tiers[1])
    for number in (1, 2):
        loaded = stages(model, offload, offloading, mode, number)
        assert InProcessPipeline(loaded).generate(PROMPTS, 8, chunk=4) == wanted


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "gemma2", "qwen2", "qwen3", "mixtral"])
def test_other_families_stream_too(
    family: str, tiny: Callable[[str], TinyModel], offloading: Offloading
) -> None:
    model = tiny(family)
    wanted = [model.greedy(prompt, 8) for prompt in PROMPTS]
    offload = StageOffload(disk_layers=ALL, embedding="disk", head="disk")
    loaded = stages(model, offload, offloading, "packed", 2)
    assert InProcessPipeline(loaded).generate(PROMPTS, 8, chunk=4) == wanted
