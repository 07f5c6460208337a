"""The timer of `plan --measure`: real steps of a tiny model, of the lengths that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mpipipe.bench.profile_points import DecodeShape, PromptShape
from mpipipe.bench.stage_timing import SliceOpener
from mpipipe.clock import MonotonicClock
from mpipipe.kv_cache.layout import BatchLayout
from mpipipe.metrics.boot import BootTimeline
from mpipipe.models.adapter import StageModel
from mpipipe.planning.plan import StagePlan
from mpipipe.progress import ProgressEngine
from mpipipe.types import SamplingParams
from tests.contract.engine_pipeline import engine_plan
from tests.contract.tiny_models import TinyModel

SHAPES = [DecodeShape(1, 9), DecodeShape(2, 17)]
PROMPTS = [PromptShape(2, 5), PromptShape(1, 4, 10)]


@pytest.mark.parametrize("ends", ["middle", "first", "last"])
def test_steps_have_the_asked_for_rows_and_keys(
    ends: str, tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(
        engine_plan(1),
        model_path=str(tiny("llama").folder),
        num_kv_pages=64,
        max_sequence_tokens=60,
        max_sequences_per_slot=2,
    )
    stage = replace(
        plan.stages[0],
        last_layer=2,
        has_embedding=ends == "first",
        has_head=ends == "last",
    )
    seen: list[tuple[bool, list[int], list[int]]] = []
    heads: list[int] = []
    run = StageModel.forward

    def forward(
        model: StageModel, inputs: torch.Tensor, layout: BatchLayout, rows: torch.Tensor | None
    ) -> torch.Tensor:
        lens = [(seq.query_len, seq.kv_len) for seq in layout.seq_lens]
        seen.append((inputs.dtype == torch.int64, *map(list, zip(*lens, strict=True))))
        if rows is not None:
            heads.append(len(rows))
        return run(model, inputs, layout, rows)

    monkeypatch.setattr(StageModel, "forward", forward)
    clock = MonotonicClock()
    opener = SliceOpener(
        plan=plan,
        device=torch.device("cpu"),
        clock=clock,
        progress=ProgressEngine(),
        boot=BootTimeline(clock),
        sampling=SamplingParams(max_new_tokens=1),
    )
    with opener.opened(_slice(stage)) as timer:
        timed = timer.timed(SHAPES, PROMPTS)
    assert list(timed.decodes) == SHAPES
    assert list(timed.prompts) == PROMPTS
    assert min(*timed.decodes.values(), *timed.prompts.values(), timer.load_bytes_per_s) > 0
    assert {takes_ids for takes_ids, _, _ in seen} == {ends == "first"}
    prefills = [(query, kv) for _, query, kv in seen if query != [1] * len(query)]
    assert [5, 5] in [query for query, _ in prefills]
    assert ([4], [14]) in prefills
    assert (set(heads) == {1, 2}) is (ends == "last")
    decodes = [kv for _, query, kv in seen if query == [1] * len(query)]
    assert [10] in decodes
    assert [18, 18] in decodes
    assert max(map(max, decodes)) <= 17 + 24


def _slice(stage: StagePlan) -> StagePlan:
    return replace(stage, weight_bytes=0)
