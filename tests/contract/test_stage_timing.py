"""The timer of `plan --measure`: real steps of a tiny model, of the lengths that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpipipe.bench.profile_points import MOST_DECODES, Brief, DecodeShape, PromptShape
from mpipipe.bench.stage_timing import SliceOpener
from mpipipe.clock import MonotonicClock
from mpipipe.errors import ConfigError
from mpipipe.kv_cache.layout import BatchLayout
from mpipipe.metrics.boot import BootTimeline
from mpipipe.models.adapter import StageModel
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
    prompts: list[list[tuple[int, int]]] = []
    decodes: list[list[int]] = []
    heads: list[int] = []
    takes_ids: set[bool] = set()
    run, run_decode = StageModel.forward, StageModel.forward_decode

    def forward(
        model: StageModel, inputs: torch.Tensor, layout: BatchLayout, rows: torch.Tensor | None
    ) -> torch.Tensor:
        prompts.append([(seq.query_len, seq.kv_len) for seq in layout.seq_lens])
        takes_ids.add(inputs.dtype == torch.int64)
        heads.append(0 if rows is None else len(rows))
        return run(model, inputs, layout, rows)

    def forward_decode(
        model: StageModel, inputs: torch.Tensor, layout: BatchLayout
    ) -> torch.Tensor:
        decodes.append(layout.kv_lens_B.tolist())
        takes_ids.add(inputs.dtype == torch.int64)
        return run_decode(model, inputs, layout)

    monkeypatch.setattr(StageModel, "forward", forward)
    monkeypatch.setattr(StageModel, "forward_decode", forward_decode)
    clock = MonotonicClock()
    opener = SliceOpener(
        plan=plan,
        device=torch.device("cpu"),
        clock=clock,
        progress=ProgressEngine(),
        boot=BootTimeline(clock),
        sampling=SamplingParams(max_new_tokens=1),
    )
    with opener.opened(stage) as timer:
        timed = timer.timed(SHAPES, PROMPTS)
    assert list(timed.decodes) == SHAPES
    assert list(timed.prompts) == PROMPTS
    assert min(*timed.decodes.values(), *timed.prompts.values(), timer.load_bytes_per_s) > 0
    assert takes_ids == {ends == "first"}
    assert [(5, 5), (5, 5)] in prompts
    assert [(4, 14)] in prompts
    assert set(heads) == ({1, 2} if ends == "last" else {0})
    assert [10] in decodes
    assert [18, 18] in decodes
    assert max(map(max, decodes)) <= 17 + MOST_DECODES


def test_the_part_of_one_lane_is_timed_without_the_others(
    tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(
        engine_plan(1),
        model_path=str(tiny("opt").folder),
        num_kv_pages=64,
        max_sequence_tokens=60,
        max_sequences_per_slot=2,
    )
    brief = Brief(plan, "", (1, 2), (), (), (), num_lanes=2)
    logits: list[tuple[int, ...]] = []
    lanes: set[tuple[int, bool]] = set()  # and whether linears are cut, whose results are summed
    run_decode = StageModel.forward_decode

    def forward_decode(
        model: StageModel, inputs: torch.Tensor, layout: BatchLayout
    ) -> torch.Tensor:
        lanes.add((model.lanes.num_lanes, bool(model._tensor_split.summed)))
        result = run_decode(model, inputs, layout)
        logits.append(tuple(result.shape))
        return result

    monkeypatch.setattr(StageModel, "forward_decode", forward_decode)
    for made in (plan, brief.lane_plan):
        clock = MonotonicClock()
        opener = SliceOpener(
            plan=made,
            device=torch.device("cpu"),
            clock=clock,
            progress=ProgressEngine(),
            boot=BootTimeline(clock),
            sampling=SamplingParams(max_new_tokens=1),
        )
        with opener.opened(plan.stages[0]) as timer:
            assert timer.timed(SHAPES[:1], PROMPTS[:1]).decodes[SHAPES[0]] > 0
    assert brief.lane_plan.tensor_parallel == 2
    assert len(set(logits)) == 1, "as many columns as all lanes have"
    assert lanes == {(1, False), (2, True)}


def test_measuring_has_no_other_machine_and_no_other_work() -> None:
    from mpipipe.cli.plan_measure import measure_command

    with pytest.raises(ConfigError, match="--gpus plans for other ones"):
        measure_command(Path("any"), [], {"--stages": None, "--gpus": "2 x t4"}, debug=False)
