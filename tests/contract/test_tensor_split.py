"""A stage split over lanes computes what the whole one does, and holds its part only."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mpipipe.data_plane.lanes import ThreadLanes
from mpipipe.models.adapter import StageModel
from mpipipe.models.operations import torch_operations
from tests.contract.lane_threads import on_lanes
from tests.contract.tiny_models import (
    InProcessPipeline,
    TinyModel,
    load_stage,
    paged_cache,
    split,
)

PROMPTS = ((5, 9, 3), (7, 7, 20, 31, 8, 90, 41, 12, 60, 33, 2))
NUM_TOKENS = 6
# One of each way to lay a layer out; in transformers' plans and by hand.
SPLIT = [
    "llama", "llama-tied", "qwen2", "qwen3", "gemma2", "mistral", "opt", "gpt_neox", "phi"
]  # fmt: skip


def stages(model: TinyModel, lanes: ThreadLanes, num_stages: int, mode: str) -> list[StageModel]:
    plans = split(num_stages)
    return [
        load_stage(
            model.folder,
            plan,
            mode=mode,
            operations=torch_operations(),
            cache=paged_cache(model.reference.config, plan.num_layers, num_lanes=lanes.num_lanes),
            lanes=lanes,
        )
        for plan in plans
    ]


def generated(
    model: TinyModel, num_lanes: int, *, num_stages: int = 1, mode: str = "plain"
) -> list[list[list[int]]]:
    """By lane, the tokens of each prompt."""

    def body(lanes: ThreadLanes) -> list[list[int]]:
        pipeline = InProcessPipeline(stages(model, lanes, num_stages, mode))
        return pipeline.generate(PROMPTS, NUM_TOKENS, chunk=4)

    return on_lanes(num_lanes, body)


@pytest.mark.parametrize("name", SPLIT)
def test_two_lanes_choose_the_tokens_of_transformers(
    name: str, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny(name)
    expected = [model.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]
    for lane in generated(model, 2):
        assert lane == expected


@pytest.mark.parametrize("mode", ["packed", "fast"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_two_lanes_of_the_fused_forms_over_two_stages_do_too(
    name: str, mode: str, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny(name)
    expected = [model.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]
    for lane in generated(model, 2, num_stages=2, mode=mode):
        assert lane == expected
